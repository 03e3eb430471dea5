"""Data: the manifest, the pixels behind it, and the journal of what people decided about labels."""
