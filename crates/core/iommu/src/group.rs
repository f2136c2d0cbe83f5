//! Groups: the smallest sets of devices that can be isolated from each other.
