"""From pictures and words to what the model reads, and the pipeline around both."""
