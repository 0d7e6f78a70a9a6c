//! Resident sharing: KSM, told which blocks have twins.
