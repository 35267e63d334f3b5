"""What each of the six methods adds to a classifier: tensors in, tensors out. CAM adds nothing."""
