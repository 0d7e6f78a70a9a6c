//! A host's memory from the firmware's map to extents, beside oracles that do only what the documentation says.
mod buddy;
mod devicetree;
mod extents;
mod firmware;
