//! What a host's kernel offers for taking memory, and setting it up with consent.
