"""How a prompt becomes a picture; the only room that imports onnxruntime.

From 1.29 on, ONNX Runtime's packages for Linux start a telemetry client the moment they are imported: it writes a
session file with an identifier to the temporary folder and tries to send events (microsoft/onnxruntime#27379). Its own
call to switch that off comes too late, since it needs the library loaded; only this variable, set before, keeps the
client from being made. So it is set here, where nothing of this room can be imported past it.
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
