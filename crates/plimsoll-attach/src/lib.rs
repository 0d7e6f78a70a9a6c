//! Running virtual machines, found and understood from outside.
