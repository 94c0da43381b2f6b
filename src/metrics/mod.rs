//! Where measurements go.
