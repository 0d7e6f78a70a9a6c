//! Every fence as a value, and the least that it does.
//!
//! Enters: a fence, with all that it depends on: its operands and who is running. Leaves: an [`Effect`], which cached
//! translations must be gone once it is done, and a [`Step`], when that is.
//!
//! A range stands for the instruction executed once for each of its smallest pages. One address is enough for all that is
//! cached of an entry which translates it, however large, and in however many pieces it is kept (SDM vol. 3, 4.10.4.1,
//! footnote to INVLPG; SFENCE.VMA: "leaf page table entries corresponding to the virtual address").
use super::{Cached, Kind, Owner, Space, Tag, Through, meet};
use crate::address::{Output, Span};
use crate::stale::Drops;

/// A fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fence {
    /// Instructions of x86-64 that act on who is running.
    X86 {
        /// Who is: INVLPG in a guest concerns its VPID or ASID only (SDM vol. 3, 29.4.3.1, formerly 28.3.3.1).
        by: Owner,
        /// The instruction.
        fence: X86,
    },
    /// Intel's for hosts.
    Vmx(Vmx),
    /// AMD's for hosts.
    Svm(Svm),
    /// Arm's, regime EL1&0.
    Arm {
        /// The current VMID.
        by: Owner,
        /// The instruction.
        fence: Arm,
    },
    /// RISC-V's.
    RiscV(RiscV),
}

/// SDM vol. 3, 4.10.4.1 "Operations that Invalidate TLBs and Paging-Structure Caches"; APM vol. 2, 5.5.3 "TLB Management".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum X86 {
    /// INVLPG: translations of the page in the current PCID, and global ones. Of paging-structure caches Intel drops all
    /// of the PCID, AMD with EFER.TCE only what leads to the page (APM vol. 2, 3.1.7): only that is counted on.
    Invlpg {
        /// The current PCID.
        pcid: u16,
        /// The pages.
        pages: Span,
    },
    /// INVPCID type 0, individual address: but for global translations, what would translate the address in the PCID.
    InvpcidAddress {
        /// The PCID.
        pcid: u16,
        /// The pages.
        pages: Span,
    },
    /// INVPCID type 1, single context: all of a PCID but global translations.
    InvpcidSingle {
        /// The PCID.
        pcid: u16,
    },
    /// INVPCID type 2: everything, global translations included.
    InvpcidAllGlobal,
    /// INVPCID type 3: everything but global translations.
    InvpcidAll,
    /// MOV to CR3 with bit 63 clear: all of the new PCID but global translations. Without CR4.PCIDE the PCID is 0.
    MovCr3 {
        /// The PCID that is loaded.
        pcid: u16,
    },
    /// MOV to CR3 with bit 63 set and CR4.PCIDE: nothing has to go.
    MovCr3Keep,
    /// MOV to CR4 that changes PGE: everything of every PCID, global translations included.
    MovCr4Pge,
}

/// SDM vol. 3, 29.4.3.1 "Operations that Invalidate Cached Mappings" (formerly 28.3.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vmx {
    /// INVEPT type 1, single context: guest-physical and combined mappings of an EP4TA, of all VPIDs and PCIDs. Linear ones
    /// need not go (29.4.3.2).
    InveptSingle {
        /// The EPT root's address (EP4TA).
        root: Output,
    },
    /// INVEPT type 2, all contexts.
    InveptAll,
    /// INVVPID type 0, individual address: linear and combined mappings that would translate it, of all PCIDs and EP4TAs.
    /// Guest-physical ones need not go (29.4.3.2), by any type.
    InvvpidAddress {
        /// The VPID.
        vpid: u16,
        /// The pages.
        pages: Span,
    },
    /// INVVPID type 1, single context.
    InvvpidSingle {
        /// The VPID.
        vpid: u16,
    },
    /// INVVPID type 2, all contexts: all VPIDs but 0.
    InvvpidAll,
    /// INVVPID type 3, single context retaining globals: "information that was used for global translations" may stay. What
    /// a paging-structure cache holds may have been, so that none of it is counted on to go.
    InvvpidSingleKeepGlobal {
        /// The VPID.
        vpid: u16,
    },
}

/// APM vol. 2, 15.16 "TLB Control" and vol. 3 "INVLPGA". What is cached of nested tables has the guest's ASID as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Svm {
    /// INVLPGA: translations of a page by its virtual address. Whether global ones or entries further up go the manual
    /// does not say: they are not counted on, and neither is what came of nested tables alone.
    Invlpga {
        /// The ASID.
        asid: u16,
        /// The pages.
        pages: Span,
    },
    /// TLB_CONTROL 1 at VMRUN: everything of every ASID, the host's too.
    FlushAll,
    /// TLB_CONTROL 3: all of the guest's ASID.
    FlushGuest {
        /// The ASID.
        asid: u16,
    },
    /// TLB_CONTROL 7: all of the guest's ASID but global translations.
    FlushGuestNonGlobal {
        /// The ASID.
        asid: u16,
    },
}

/// Arm ARM (DDI 0487) D8.17 "TLB maintenance"; DDI 0601, pages of the TLBI instructions. The forms that reach all
/// processors (..IS, ..OS) and ranges (R..) do the same there.
///
/// A TLBI sees a change that a DSB before it has completed, and is complete itself at the next DSB; between the two its
/// moment, and the order among several, are open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arm {
    /// DSB that waits for stores and for TLBIs.
    Dsb,
    /// TLBI VAE1: any level of stage 1 that translates the address in the ASID, and global translations.
    Vae1 {
        /// The ASID.
        asid: u16,
        /// The pages.
        pages: Span,
    },
    /// TLBI VALE1: as VAE1, the last level only.
    Vale1 {
        /// The ASID.
        asid: u16,
        /// The pages.
        pages: Span,
    },
    /// TLBI VAAE1: as VAE1 in every ASID.
    Vaae1 {
        /// The pages.
        pages: Span,
    },
    /// TLBI VAALE1: as VAAE1, the last level only.
    Vaale1 {
        /// The pages.
        pages: Span,
    },
    /// TLBI ASIDE1: all of stage 1 in the ASID but global translations.
    Aside1 {
        /// The ASID.
        asid: u16,
    },
    /// TLBI VMALLE1: all of stage 1 in the current VMID.
    Vmalle1,
    /// TLBI VMALLS12E1: both stages in the current VMID.
    Vmalls12e1,
    /// TLBI IPAS2E1: stage 2 of the current VMID for the addresses; what combines both stages need not go.
    Ipas2e1 {
        /// The guest physical pages.
        pages: Span,
    },
    /// TLBI IPAS2LE1: as IPAS2E1, the last level only.
    Ipas2le1 {
        /// The guest physical pages.
        pages: Span,
    },
    /// TLBI ALLE1: both stages in every VMID.
    Alle1,
}

/// RISC-V privileged architecture, 12.2.1 "Supervisor Memory-Management Fence Instruction", 18.3.2 "Hypervisor
/// Memory-Management Fence Instructions", chapter "Svinval". `None` for pages or identifiers is x0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RiscV {
    /// SFENCE.VMA: with an address leaf entries only; with an ASID no global mappings.
    SfenceVma {
        /// Whose `satp` it is: the host's, or in a guest the current VMID's.
        by: Owner,
        /// rs1.
        pages: Option<Span>,
        /// rs2.
        asid: Option<u16>,
    },
    /// HFENCE.VVMA: what SFENCE.VMA would do in the guest.
    HfenceVvma {
        /// hgatp.VMID.
        vmid: u16,
        /// rs1.
        pages: Option<Span>,
        /// rs2.
        asid: Option<u16>,
    },
    /// HFENCE.GVMA: the second stage, and what combines both. With an address leaf entries only, as with SFENCE.VMA.
    HfenceGvma {
        /// rs1, which holds it shifted right by two.
        pages: Option<Span>,
        /// rs2.
        vmid: Option<u16>,
    },
    /// SFENCE.W.INVAL: stores before it are seen by the invalidations after it.
    SfenceWInval,
    /// SFENCE.INVAL.IR: invalidations before it are done.
    SfenceInvalIr,
    /// SINVAL.VMA, between the two: as SFENCE.VMA.
    SinvalVma {
        /// Whose `satp` it is.
        by: Owner,
        /// rs1.
        pages: Option<Span>,
        /// rs2.
        asid: Option<u16>,
    },
    /// HINVAL.VVMA, between the two: as HFENCE.VVMA.
    HinvalVvma {
        /// hgatp.VMID.
        vmid: u16,
        /// rs1.
        pages: Option<Span>,
        /// rs2.
        asid: Option<u16>,
    },
    /// HINVAL.GVMA, between the two: as HFENCE.GVMA.
    HinvalGvma {
        /// rs1.
        pages: Option<Span>,
        /// rs2.
        vmid: Option<u16>,
    },
}

/// When a fence does what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// At once, and after the stores before it.
    Now(Effect),
    /// At some moment before the next [`Step::Closes`], if a [`Step::Opens`] came before it.
    Open(Effect),
    /// Stores before it are seen by what follows.
    Opens,
    /// What was open is done.
    Closes,
    /// Both.
    ClosesAndOpens,
}

bitflags::bitflags! {
    /// Sorts of what is cached, by stages and kind.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Sorts: u8 {
        const FIRST_LEAF = 1;
        const FIRST_STRUCTURE = 1 << 1;
        const SECOND_LEAF = 1 << 2;
        const SECOND_STRUCTURE = 1 << 3;
        const BOTH_LEAF = 1 << 4;
        const BOTH_STRUCTURE = 1 << 5;
        /// What a fence of the first stage is about.
        const VIRTUAL_LEAF = Self::FIRST_LEAF.bits() | Self::BOTH_LEAF.bits();
        const VIRTUAL = Self::VIRTUAL_LEAF.bits() | Self::FIRST_STRUCTURE.bits() | Self::BOTH_STRUCTURE.bits();
        const SECOND = Self::SECOND_LEAF.bits() | Self::SECOND_STRUCTURE.bits();
        const BOTH = Self::BOTH_LEAF.bits() | Self::BOTH_STRUCTURE.bits();
    }
}

impl Sorts {
    const fn of(cached: &Cached) -> Self {
        match (cached.through, cached.kind) {
            (Through::First, Kind::Leaf) => Self::FIRST_LEAF,
            (Through::First, Kind::Structure) => Self::FIRST_STRUCTURE,
            (Through::Second, Kind::Leaf) => Self::SECOND_LEAF,
            (Through::Second, Kind::Structure) => Self::SECOND_STRUCTURE,
            (Through::Both, Kind::Leaf) => Self::BOTH_LEAF,
            (Through::Both, Kind::Structure) => Self::BOTH_STRUCTURE,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owners {
    All,
    Guests,
    One(Owner),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spaces {
    All,
    AllButGlobal,
    /// Without what is global.
    One(u16),
    /// With what is global.
    OneAndGlobal(u16),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Everywhere,
    /// Addresses before the first stage.
    First(Span),
    /// Addresses before the second stage.
    Second(Span),
}

/// The cached translations that must be gone: all that every part of it applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Effect {
    sorts: Sorts,
    owners: Owners,
    spaces: Spaces,
    root: Option<Output>,
    place: Place,
}

impl Effect {
    const fn new(sorts: Sorts, owners: Owners) -> Self {
        Self { sorts, owners, spaces: Spaces::All, root: None, place: Place::Everywhere }
    }

    const fn spaces(self, spaces: Spaces) -> Self {
        Self { spaces, ..self }
    }

    const fn at(self, pages: Span) -> Self {
        Self { place: Place::First(pages), ..self }
    }

    const fn behind(self, pages: Span) -> Self {
        Self { place: Place::Second(pages), ..self }
    }

    /// The range of its addresses, where it has one.
    pub(super) const fn pages(&self) -> Option<Span> {
        match self.place {
            Place::Everywhere => None,
            Place::First(pages) | Place::Second(pages) => Some(pages),
        }
    }
}

impl Drops<Cached> for Effect {
    fn drops(&self, cached: &Cached) -> bool {
        let Tag { owner, space } = cached.tag;
        let owned = match self.owners {
            Owners::All => true,
            Owners::Guests => owner != Owner::Host,
            Owners::One(one) => owner == one && owner != Owner::AnyGuest,
        };
        let of = |id: u16| space == Space::Some(id);
        let spaced = match self.spaces {
            Spaces::All => true,
            Spaces::AllButGlobal => !cached.global,
            Spaces::One(id) => !cached.global && of(id),
            Spaces::OneAndGlobal(id) => cached.global || of(id),
        };
        let placed = match self.place {
            Place::Everywhere => true,
            Place::First(pages) => cached.first.is_some_and(|span| meet(span, pages)),
            Place::Second(pages) => cached.second.is_some_and(|span| meet(span, pages)),
        };
        let rooted = self.root.is_none() || self.root == cached.root;
        owned && spaced && placed && rooted && self.sorts.contains(Sorts::of(cached))
    }
}

impl Fence {
    /// Whether the fence, once it is done, has made the processor forget this for certain.
    pub fn drops(&self, cached: &Cached) -> bool {
        match self.step() {
            Step::Now(effect) | Step::Open(effect) => effect.drops(cached),
            Step::Opens | Step::Closes | Step::ClosesAndOpens => false,
        }
    }

    pub(super) fn step(&self) -> Step {
        match *self {
            Self::X86 { by, fence } => fence.effect(by).map_or(Step::Opens, Step::Now),
            Self::Vmx(fence) => Step::Now(fence.effect()),
            Self::Svm(fence) => Step::Now(fence.effect()),
            Self::Arm { by, fence } => fence.effect(by).map_or(Step::ClosesAndOpens, Step::Open),
            Self::RiscV(fence) => fence.step(),
        }
    }
}

impl X86 {
    fn effect(self, by: Owner) -> Option<Effect> {
        let of = Effect::new(Sorts::VIRTUAL, Owners::One(by));
        Some(match self {
            Self::Invlpg { pcid, pages } => of.spaces(Spaces::OneAndGlobal(pcid)).at(pages),
            Self::InvpcidAddress { pcid, pages } => of.spaces(Spaces::One(pcid)).at(pages),
            Self::InvpcidSingle { pcid } | Self::MovCr3 { pcid } => of.spaces(Spaces::One(pcid)),
            Self::InvpcidAll => of.spaces(Spaces::AllButGlobal),
            Self::InvpcidAllGlobal | Self::MovCr4Pge => of,
            Self::MovCr3Keep => return None,
        })
    }
}

impl Vmx {
    fn effect(self) -> Effect {
        let ept = Effect::new(Sorts::SECOND | Sorts::BOTH, Owners::All);
        let of = |vpid, sorts| Effect::new(sorts, Owners::One(Owner::Guest(vpid)));
        match self {
            Self::InveptSingle { root } => Effect { root: Some(root), ..ept },
            Self::InveptAll => ept,
            Self::InvvpidAddress { vpid, pages } => of(vpid, Sorts::VIRTUAL).at(pages),
            Self::InvvpidSingle { vpid } => of(vpid, Sorts::VIRTUAL),
            Self::InvvpidAll => Effect::new(Sorts::VIRTUAL, Owners::Guests),
            Self::InvvpidSingleKeepGlobal { vpid } => {
                of(vpid, Sorts::VIRTUAL_LEAF).spaces(Spaces::AllButGlobal)
            }
        }
    }
}

impl Svm {
    fn effect(self) -> Effect {
        let of = |asid, sorts| Effect::new(sorts, Owners::One(Owner::Guest(asid)));
        match self {
            Self::Invlpga { asid, pages } => {
                of(asid, Sorts::VIRTUAL_LEAF).spaces(Spaces::AllButGlobal).at(pages)
            }
            Self::FlushAll => Effect::new(Sorts::all(), Owners::All),
            Self::FlushGuest { asid } => of(asid, Sorts::all()),
            Self::FlushGuestNonGlobal { asid } => of(asid, Sorts::all()).spaces(Spaces::AllButGlobal),
        }
    }
}

impl Arm {
    fn effect(self, by: Owner) -> Option<Effect> {
        let of = |sorts| Effect::new(sorts, Owners::One(by));
        Some(match self {
            Self::Dsb => return None,
            Self::Vae1 { asid, pages } => of(Sorts::VIRTUAL).spaces(Spaces::OneAndGlobal(asid)).at(pages),
            Self::Vale1 { asid, pages } => {
                of(Sorts::VIRTUAL_LEAF).spaces(Spaces::OneAndGlobal(asid)).at(pages)
            }
            Self::Vaae1 { pages } => of(Sorts::VIRTUAL).at(pages),
            Self::Vaale1 { pages } => of(Sorts::VIRTUAL_LEAF).at(pages),
            Self::Aside1 { asid } => of(Sorts::VIRTUAL).spaces(Spaces::One(asid)),
            Self::Vmalle1 => of(Sorts::VIRTUAL),
            Self::Vmalls12e1 => of(Sorts::all()),
            Self::Ipas2e1 { pages } => of(Sorts::SECOND).behind(pages),
            Self::Ipas2le1 { pages } => of(Sorts::SECOND_LEAF).behind(pages),
            Self::Alle1 => Effect::new(Sorts::all(), Owners::All),
        })
    }
}

impl RiscV {
    fn step(self) -> Step {
        match self {
            Self::SfenceVma { by, pages, asid } => Step::Now(first(by, pages, asid)),
            Self::SinvalVma { by, pages, asid } => Step::Open(first(by, pages, asid)),
            Self::HfenceVvma { vmid, pages, asid } => Step::Now(first(Owner::Guest(vmid), pages, asid)),
            Self::HinvalVvma { vmid, pages, asid } => Step::Open(first(Owner::Guest(vmid), pages, asid)),
            Self::HfenceGvma { pages, vmid } => Step::Now(second(pages, vmid)),
            Self::HinvalGvma { pages, vmid } => Step::Open(second(pages, vmid)),
            Self::SfenceWInval => Step::Opens,
            Self::SfenceInvalIr => Step::Closes,
        }
    }
}

/// The four forms of SFENCE.VMA.
fn first(by: Owner, pages: Option<Span>, asid: Option<u16>) -> Effect {
    let spaces = asid.map_or(Spaces::All, Spaces::One);
    let of = |sorts| Effect::new(sorts, Owners::One(by)).spaces(spaces);
    pages.map_or(of(Sorts::VIRTUAL), |pages| of(Sorts::VIRTUAL_LEAF).at(pages))
}

/// The four forms of HFENCE.GVMA. A combined entry that names a guest's table depends on the leaf which maps that table.
fn second(pages: Option<Span>, vmid: Option<u16>) -> Effect {
    let owners = vmid.map_or(Owners::Guests, |vmid| Owners::One(Owner::Guest(vmid)));
    let of = |sorts| Effect::new(sorts, owners);
    let leaf = Sorts::SECOND_LEAF | Sorts::BOTH;
    pages.map_or(of(Sorts::SECOND | Sorts::BOTH), |pages| of(leaf).behind(pages))
}
