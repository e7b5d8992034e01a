"""Models that the package makes itself: no download, real ONNX graphs. Each module builds one, with its tokenizer."""
