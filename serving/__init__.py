"""The HTTP worker, the demo page and the Inference Endpoints handler."""
