//! The fences that a change needs, by architecture: those that drop least come first.
//!
//! Enters: a change. Leaves: the first sequence of the table below that [`super::check()`] finds enough, so that what is recommended is
//! what has been checked. Tables of the host's own are fenced by its own instructions, tables of guests by the host's
//! for guests.
use super::check::{Architecture, Change, Consequence, Regime, Stage, stale};
use super::fence::{Arm, Fence, RiscV, Svm, Vmx, X86};
use super::{Owner, Space};
use crate::address::Span;

/// The longest sequence.
const LONGEST: usize = 5;

/// Fences, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe {
    fences: [Fence; LONGEST],
    count: usize,
}

impl Recipe {
    /// What does nothing.
    const NONE: Self =
        Self { fences: [Fence::X86 { by: Owner::Host, fence: X86::MovCr3Keep }; LONGEST], count: 0 };

    fn of<const N: usize>(fences: [Fence; N]) -> Self {
        const { assert!(N <= LONGEST, "a recipe is no longer than this") };
        let mut recipe = Self { count: N, ..Self::NONE };
        for (place, fence) in recipe.fences.iter_mut().zip(fences) {
            *place = fence;
        }
        recipe
    }

    /// The fences; none if none is needed.
    pub fn as_slice(&self) -> &[Fence] {
        self.fences.get(..self.count).unwrap_or_default()
    }
}

/// The fences that a change needs for everything at least as bad as `least` to be gone; `None` if nothing this architecture
/// has is enough: tables that several guests' tags lead to, where each guest must be fenced by itself.
pub fn needed(change: &Change, regime: &Regime, least: Consequence) -> Option<Recipe> {
    let enough = |recipe: &Recipe| stale(change, regime, recipe.as_slice(), least).is_none();
    core::iter::once(Recipe::NONE).chain(candidates(change, regime).into_iter().flatten()).find(enough)
}

/// The most sequences that an architecture offers.
type Candidates = [Option<Recipe>; 7];

fn candidates(change: &Change, regime: &Regime) -> Candidates {
    let (pages, owner, space) = (change.span, change.tag.owner, change.tag.space);
    match (regime.architecture, change.stage) {
        (Architecture::Intel, Stage::Second) => {
            let single = change.root.map(|root| Vmx::InveptSingle { root });
            some(
                [single, Some(Vmx::InveptAll)]
                    .map(|fence| fence.map(|fence| Recipe::of([Fence::Vmx(fence)]))),
            )
        }
        (Architecture::Intel | Architecture::Amd, Stage::First) if owner == Owner::Host => x86(pages, space),
        (Architecture::Intel, Stage::First) => intel_guest(pages, owner),
        (Architecture::Amd, _) => amd_guest(pages, owner),
        (Architecture::Arm, Stage::First) => arm_first(pages, owner, space),
        (Architecture::Arm, Stage::Second) => arm_second(pages, owner),
        (Architecture::RiscV, Stage::First) => riscv_first(pages, owner, space),
        (Architecture::RiscV, Stage::Second) => riscv_second(pages, owner),
    }
}

fn some<const N: usize>(recipes: [Option<Recipe>; N]) -> Candidates {
    let mut all = Candidates::default();
    for (place, recipe) in all.iter_mut().zip(recipes) {
        *place = recipe;
    }
    all
}

fn x86(pages: Span, space: Space) -> Candidates {
    let one = |fence| Recipe::of([Fence::X86 { by: Owner::Host, fence }]);
    some([
        space.map(|pcid| one(X86::Invlpg { pcid, pages })),
        space.map(|pcid| one(X86::InvpcidSingle { pcid })),
        Some(one(X86::InvpcidAllGlobal)),
    ])
}

/// The identifier of one guest.
const fn guest(owner: Owner) -> Option<u16> {
    match owner {
        Owner::Guest(id) => Some(id),
        Owner::Host | Owner::AnyGuest => None,
    }
}

fn intel_guest(pages: Span, owner: Owner) -> Candidates {
    let one = |fence| Recipe::of([Fence::Vmx(fence)]);
    let vpid = guest(owner);
    some([
        vpid.map(|vpid| one(Vmx::InvvpidAddress { vpid, pages })),
        vpid.map(|vpid| one(Vmx::InvvpidSingleKeepGlobal { vpid })),
        vpid.map(|vpid| one(Vmx::InvvpidSingle { vpid })),
        Some(one(Vmx::InvvpidAll)),
    ])
}

fn amd_guest(pages: Span, owner: Owner) -> Candidates {
    let one = |fence| Recipe::of([Fence::Svm(fence)]);
    let asid = guest(owner);
    some([
        asid.map(|asid| one(Svm::Invlpga { asid, pages })),
        asid.map(|asid| one(Svm::FlushGuestNonGlobal { asid })),
        asid.map(|asid| one(Svm::FlushGuest { asid })),
        Some(one(Svm::FlushAll)),
    ])
}

fn arm_first(pages: Span, by: Owner, space: Space) -> Candidates {
    let one = |fence| {
        let [dsb, fence] = [Arm::Dsb, fence].map(|fence| Fence::Arm { by, fence });
        Recipe::of([dsb, fence, dsb])
    };
    some([
        space.map(|asid| one(Arm::Vale1 { asid, pages })),
        space.map(|asid| one(Arm::Vae1 { asid, pages })),
        Some(one(Arm::Vaale1 { pages })),
        Some(one(Arm::Vaae1 { pages })),
        space.map(|asid| one(Arm::Aside1 { asid })),
        Some(one(Arm::Vmalle1)),
        Some(one(Arm::Alle1)),
    ])
}

/// The second stage's entry must be gone for certain before the combined ones go, which would be made of it again.
fn arm_second(pages: Span, by: Owner) -> Candidates {
    let arm = |fence| Fence::Arm { by, fence };
    let dsb = arm(Arm::Dsb);
    let two = |fence| Recipe::of([dsb, arm(fence), dsb, arm(Arm::Vmalle1), dsb]);
    some([
        Some(two(Arm::Ipas2le1 { pages })),
        Some(two(Arm::Ipas2e1 { pages })),
        Some(Recipe::of([dsb, arm(Arm::Vmalls12e1), dsb])),
        Some(Recipe::of([dsb, arm(Arm::Alle1), dsb])),
    ])
}

fn riscv_first(pages: Span, owner: Owner, space: Space) -> Candidates {
    let one = |pages, asid| {
        let fence = match owner {
            Owner::Guest(vmid) => RiscV::HfenceVvma { vmid, pages, asid },
            by => RiscV::SfenceVma { by, pages, asid },
        };
        Recipe::of([Fence::RiscV(fence)])
    };
    some([
        space.map(|asid| one(Some(pages), Some(asid))),
        Some(one(Some(pages), None)),
        space.map(|asid| one(None, Some(asid))),
        Some(one(None, None)),
    ])
}

fn riscv_second(pages: Span, owner: Owner) -> Candidates {
    let vmid = guest(owner);
    let one = |pages, vmid| Recipe::of([Fence::RiscV(RiscV::HfenceGvma { pages, vmid })]);
    some([
        vmid.map(|vmid| one(Some(pages), Some(vmid))),
        Some(one(Some(pages), None)),
        vmid.map(|vmid| one(None, Some(vmid))),
        Some(one(None, None)),
    ])
}
