"""A worker that answers web sites: pictures and questions in over HTTP, text out."""
