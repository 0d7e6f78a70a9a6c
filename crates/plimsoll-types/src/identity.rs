//! Who owns a page: machines, groups of machines, and the domains inside which pages may be shared.
use core::fmt;

macro_rules! identity {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        pub struct $name(pub u32);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

identity!(
    /// One virtual machine, unique for the life of a manager and of every manager that takes over from it.
    MachineId,
    "vm"
);
identity!(
    /// A tenant or compartment: machines that share a reservation, a limit and shares.
    GroupId,
    "group"
);
identity!(
    /// A sharing domain. Pages with equal bytes may be kept once only inside one domain, because the time a write
    /// to a shared page takes tells a guest that somebody else has the same bytes.
    DomainId,
    "domain"
);
