"""What one record of an annotation file says, in each file format."""
