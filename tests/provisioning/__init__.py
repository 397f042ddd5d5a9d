"""Tests of the connected side."""
