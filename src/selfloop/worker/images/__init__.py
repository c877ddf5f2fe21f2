"""Images from their files to pixels, in a process of its own: what a decoder runs away with is ended by the system."""
