"""The network whose features the metrics are computed from: imported from a frozen GraphDef, run by ONNX Runtime."""
