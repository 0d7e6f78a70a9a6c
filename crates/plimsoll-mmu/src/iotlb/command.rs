//! Every command as a value, and the least that it does.
//!
//! Enters: a command with its operands. Leaves: an [`Effect`], which kept things must be gone once a wait behind it is over, and the
//! order in which units carry commands out, as far as they promise one.
//!
//! A range stands for the commands that cover it.
use super::{Kept, Kind};
use crate::address::Span;
use crate::stale::{Drops, Item};
use crate::tlb::meet;

/// A command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Intel's.
    Vtd(Vtd),
    /// AMD's.
    AmdVi(AmdVi),
    /// Arm's.
    Smmu(Smmu),
}

/// Whether entries that name tables are meant as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Depth {
    /// Translations only.
    Leaves,
    /// All that leads to the pages.
    All,
}

/// Whether accesses that were translated before are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Drain {
    /// DR and DW are set, or the unit always does (CAP.DRD and CAP.DWD; implied since version 6).
    On,
    /// They are not.
    Off,
}

/// Intel Virtualization Technology for Directed I/O, 6.5.2 "Queued Invalidation Interface", for requests without PASID.
///
/// By 6.5.2.11 an IOTLB invalidation is begun when the context-cache invalidations ahead of it are done, a Device-TLB
/// invalidation when the IOTLB invalidations ahead of it are, and a wait is over when all ahead of it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vtd {
    /// `cc_inv_dsc`, global.
    ContextAll,
    /// `cc_inv_dsc`, domain-selective.
    ContextDomain {
        /// The domain that the entry gave when it was read.
        domain: u16,
    },
    /// `cc_inv_dsc`, device-selective.
    ContextDevice {
        /// The domain that the entry gave when it was read.
        domain: u16,
        /// Its requester identifier.
        device: u16,
    },
    /// `iotlb_inv_dsc`, global.
    IotlbAll {
        /// DR, DW.
        drain: Drain,
    },
    /// `iotlb_inv_dsc`, domain-selective.
    IotlbDomain {
        /// The domain.
        domain: u16,
        /// DR, DW.
        drain: Drain,
    },
    /// `iotlb_inv_dsc`, page-selective within a domain. IH set says that no entry was changed which names a table.
    IotlbPages {
        /// The domain.
        domain: u16,
        /// The pages.
        pages: Span,
        /// IH: set for leaves.
        depth: Depth,
        /// DR, DW.
        drain: Drain,
    },
    /// `dev_tlb_inv_dsc`; all addresses if none are given.
    DeviceTlb {
        /// Its requester identifier.
        device: u16,
        /// The pages.
        pages: Option<Span>,
    },
    /// `inv_wait_dsc`, and software has seen its status written.
    Wait,
}

/// AMD I/O Virtualization Technology (IOMMU) Specification (48882), 2.4 "Commands". No order is counted on but that of waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AmdVi {
    /// INVALIDATE_DEVTAB_ENTRY.
    DevtabEntry {
        /// Its device identifier.
        device: u16,
    },
    /// INVALIDATE_IOMMU_PAGES; all addresses (S, and an address of ones) if none are given. Accesses by what it drops are done when the
    /// wait behind it is over.
    Pages {
        /// The domain.
        domain: u16,
        /// Address and S.
        pages: Option<Span>,
        /// PDE: set for entries that name tables as well.
        depth: Depth,
    },
    /// INVALIDATE_IOTLB_PAGES: the device's own; all addresses if none are given.
    IotlbPages {
        /// Its device identifier.
        device: u16,
        /// Address and S.
        pages: Option<Span>,
    },
    /// INVALIDATE_IOMMU_ALL: all that the unit keeps.
    All,
    /// COMPLETION_WAIT, and software has seen its store or interrupt.
    CompletionWait,
}

/// Arm System Memory Management Unit Architecture Specification, version 3 (IHI 0070), chapter 4 "Commands", for streams that have a
/// second stage alone. Invalidations are done when a CMD_SYNC behind them is over (4.7.3), and for those of translations the accesses by
/// what they drop; no order is promised before that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Smmu {
    /// CMD_CFGI_STE.
    CfgiSte {
        /// The stream.
        stream: u16,
    },
    /// CMD_CFGI_ALL.
    CfgiAll,
    /// CMD_TLBI_S2_IPA.
    TlbiS2Ipa {
        /// The VMID.
        vmid: u16,
        /// The pages.
        pages: Span,
        /// Leaf.
        depth: Depth,
    },
    /// CMD_TLBI_S12_VMALL.
    TlbiS12Vmall {
        /// The VMID.
        vmid: u16,
    },
    /// CMD_TLBI_NSNH_ALL.
    TlbiNsnhAll,
    /// CMD_ATC_INV: the device's own; all addresses if none are given.
    AtcInv {
        /// The stream.
        stream: u16,
        /// Address and Size.
        pages: Option<Span>,
    },
    /// CMD_SYNC, and software has seen its completion.
    Sync,
}

bitflags::bitflags! {
    /// Sorts of what is kept.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Sorts: u8 {
        const CONTEXT = 1;
        const STRUCTURE = 1 << 1;
        const LEAF = 1 << 2;
        const REMOTE = 1 << 3;
        const ACCESS = 1 << 4;
        /// What a domain is the name of.
        const UNIT = Self::STRUCTURE.bits() | Self::LEAF.bits() | Self::ACCESS.bits();
    }
}

impl Sorts {
    const fn of(kind: Kind) -> Self {
        match kind {
            Kind::Context => Self::CONTEXT,
            Kind::Structure => Self::STRUCTURE,
            Kind::Leaf => Self::LEAF,
            Kind::Remote => Self::REMOTE,
            Kind::Access => Self::ACCESS,
        }
    }

    const fn pages(depth: Depth) -> Self {
        match depth {
            Depth::Leaves => Self::LEAF.union(Self::ACCESS),
            Depth::All => Self::UNIT,
        }
    }

    const fn drained(self, drain: Drain) -> Self {
        match drain {
            Drain::On => self,
            Drain::Off => self.difference(Self::ACCESS),
        }
    }
}

/// The kept things that must be gone: all that every part of it applies to. What is `None` applies to all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Effect {
    sorts: Sorts,
    device: Option<u16>,
    domain: Option<u16>,
    pages: Option<Span>,
}

impl Effect {
    const fn new(sorts: Sorts) -> Self {
        Self { sorts, device: None, domain: None, pages: None }
    }

    const fn device(self, device: u16) -> Self {
        Self { device: Some(device), ..self }
    }

    const fn domain(self, domain: u16) -> Self {
        Self { domain: Some(domain), ..self }
    }

    const fn at(self, pages: Option<Span>) -> Self {
        Self { pages, ..self }
    }

    /// The pages, if it is about some only.
    pub(super) const fn pages(&self) -> Option<Span> {
        self.pages
    }

    /// What a unit does first comes first: Intel's order.
    pub(super) const fn rank(&self) -> u8 {
        if self.sorts.contains(Sorts::CONTEXT) {
            0
        } else if self.sorts.contains(Sorts::REMOTE) {
            2
        } else {
            1
        }
    }
}

impl Drops<Kept> for Effect {
    fn drops(&self, kept: &Kept) -> bool {
        let is = |wanted: Option<u16>, own| wanted.is_none() || wanted == own;
        let there = match (self.pages, kept.pages) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(pages), Some(own)) => meet(pages, own),
        };
        self.sorts.contains(Sorts::of(kept.kind))
            && is(self.device, kept.device)
            && is(self.domain, kept.domain)
            && there
    }
}

impl Item for Kept {
    fn makes(&self, item: &Self) -> bool {
        use Kind::{Access, Context, Leaf, Remote, Structure};
        matches!(
            (self.kind, item.kind),
            (Context, Structure | Leaf | Remote | Access)
                | (Structure, Leaf | Remote | Access)
                | (Leaf, Remote | Access)
        )
    }
}

impl Command {
    /// What it does; `None` for a wait.
    pub(super) fn effect(&self) -> Option<Effect> {
        match *self {
            Self::Vtd(command) => command.effect(),
            Self::AmdVi(command) => command.effect(),
            Self::Smmu(command) => command.effect(),
        }
    }
}

impl Vtd {
    fn effect(self) -> Option<Effect> {
        let unit = |drain| Effect::new(Sorts::UNIT.drained(drain));
        let context = Effect::new(Sorts::CONTEXT);
        Some(match self {
            Self::ContextAll => context,
            Self::ContextDomain { domain } => context.domain(domain),
            Self::ContextDevice { domain, device } => context.domain(domain).device(device),
            Self::IotlbAll { drain } => unit(drain),
            Self::IotlbDomain { domain, drain } => unit(drain).domain(domain),
            Self::IotlbPages { domain, pages, depth, drain } => {
                Effect::new(Sorts::pages(depth).drained(drain)).domain(domain).at(Some(pages))
            }
            Self::DeviceTlb { device, pages } => Effect::new(Sorts::REMOTE).device(device).at(pages),
            Self::Wait => return None,
        })
    }
}

impl AmdVi {
    fn effect(self) -> Option<Effect> {
        Some(match self {
            Self::DevtabEntry { device } => Effect::new(Sorts::CONTEXT).device(device),
            Self::Pages { domain, pages, depth } => Effect::new(Sorts::pages(depth)).domain(domain).at(pages),
            Self::IotlbPages { device, pages } => Effect::new(Sorts::REMOTE).device(device).at(pages),
            Self::All => Effect::new(Sorts::CONTEXT | Sorts::UNIT),
            Self::CompletionWait => return None,
        })
    }
}

impl Smmu {
    fn effect(self) -> Option<Effect> {
        Some(match self {
            Self::CfgiSte { stream } => Effect::new(Sorts::CONTEXT).device(stream),
            Self::CfgiAll => Effect::new(Sorts::CONTEXT),
            Self::TlbiS2Ipa { vmid, pages, depth } => {
                Effect::new(Sorts::pages(depth)).domain(vmid).at(Some(pages))
            }
            Self::TlbiS12Vmall { vmid } => Effect::new(Sorts::UNIT).domain(vmid),
            Self::TlbiNsnhAll => Effect::new(Sorts::UNIT),
            Self::AtcInv { stream, pages } => Effect::new(Sorts::REMOTE).device(stream).at(pages),
            Self::Sync => return None,
        })
    }
}
