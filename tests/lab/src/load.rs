//! Load of our own, for what the usual tools do not measure.
