"""Images as rows for the decoder: from pixels to features, and where these stand in a batch."""
