"""A small draft made from its target: the text it is trained on, the training, its acceptance."""
