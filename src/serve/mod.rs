//! The HTTP service: the only module that knows HTTP or the wire types.
