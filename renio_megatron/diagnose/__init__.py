"""Does the method act as its settings promise? What a run says about itself."""
