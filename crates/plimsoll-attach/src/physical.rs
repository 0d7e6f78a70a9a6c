//! The guest's physical address space: where in a VMM's process each guest physical address of RAM lies.
//!
//! Enters: a dossier, and a monitor if there is one. Leaves: pieces of RAM with both addresses. A QEMU's monitor is asked for what
//! the processors see and where it lies in the process; without one the VMM's own rule is applied, and where the rule
//! depends on what cannot be seen from outside, that is said instead. What must never happen: an address that is a guess.
//!
//! The rules, each for RAM of a given size:
//!
//! * QEMU's pc (hw/i386/pc_piix.c): from 3.5 GiB on, all beyond 3 GiB moves to 4 GiB. q35 (pc_q35.c): from 2.75 GiB on, all beyond
//!   2 GiB does. NUMA nodes lie one after the other by number. What lies between 640 KiB and 1 MiB may be
//!   ROM or a device's and is left out.
//! * Cloud Hypervisor, Firecracker, crosvm: one cut at the hole below 4 GiB, where RAM lies in two mappings; none where it is smaller.
//!   Two pieces that the kernel joined into one mapping are in either order.

use crate::argv::{Options, Properties};
use crate::qmp::{FlatKind, Qmp, QmpError};
use crate::ram::GIVEN;
use crate::vmm::{self, Block, Note, Origin, Vmm};
use crate::{Dossier, Held, RamRange, Refusal};
use plimsoll_sys::HvaRange;
use plimsoll_types::{ByteCount, Gpa};

/// Where RAM goes on above the hole.
const ABOVE: u64 = 4 << 30;
/// Where the HyperTransport hole below 1 TiB begins. Since 7.1, a QEMU with an AMD processor moves RAM behind it from 4 GiB to 1 TiB
/// once the 64-bit hole of PCI, which follows RAM, reaches it.
const HYPERTRANSPORT: u64 = 0xfd_0000_0000;
/// How far behind its RAM that hole of a QEMU ends at most: RAM has moved by up to 4 GiB, q35's has 32 GiB, and begins at a whole GiB.
const HOLE_64: u64 = 37 << 30;
/// The part of the first MiB of a PC that may be something else than RAM.
const LEGACY: (u64, u64) = (0xa_0000, 0x10_0000);

/// A piece of guest RAM with both its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Where the guest has it.
    pub gpa: Gpa,
    /// Where it lies in the VMM's process.
    pub hva: HvaRange,
    /// The block it is of.
    pub block: String,
}

/// The guest's physical addresses cannot be told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PhysicalError {
    /// From outside they cannot.
    #[error(
        "where guest RAM lies in the guest cannot be told from outside ({why}): give a monitor with --qmp"
    )]
    Unseen {
        /// What stands in the way.
        why: String,
    },
    /// No rule, and no monitor that could be asked.
    #[error("where guest RAM lies in the guest cannot be told ({why})")]
    Unknown {
        /// What stands in the way.
        why: String,
    },
    /// Its RAM is not there to be looked at.
    #[error("{name} shows no guest RAM: {why}")]
    NoRam {
        /// The machine.
        name: String,
        /// Why.
        why: String,
    },
    /// The monitor and the mappings contradict each other.
    #[error(
        "QEMU says that {gpa} lies at {hva} of its process, which is not in guest RAM as it was found there"
    )]
    Contradiction {
        /// The guest's address.
        gpa: Gpa,
        /// What should be there.
        hva: String,
    },
    /// The monitor failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The process cannot be looked at.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// Where guest RAM lies in the guest, by asking the machine's monitor.
pub fn ask(qmp: &mut Qmp, dossier: &Dossier) -> Result<Vec<Placed>, PhysicalError> {
    has_ram(dossier)?;
    let mut pieces = Vec::new();
    for seen in qmp.flat_view()? {
        let start = qmp.hva(seen.gpa)?;
        let hva = HvaRange::new(start, seen.len);
        match hva.and_then(|hva| Some((hva, dossier.range_with(hva)?))) {
            Some((hva, ram)) => pieces.push(Placed { gpa: seen.gpa, hva, block: ram.block.clone() }),
            // Firmware, and what video cards have, is memory and not the machine's RAM.
            None if seen.kind == FlatKind::Rom || !is_ram(&seen.name, dossier) => {}
            None => {
                let hva = format!("{start}, {} long", seen.len);
                return Err(PhysicalError::Contradiction { gpa: seen.gpa, hva });
            }
        }
    }
    Ok(pieces)
}

fn is_ram(name: &str, dossier: &Dossier) -> bool {
    let is_block = |ram: &RamRange| name == ram.block || name.ends_with(&format!("/{}", ram.block));
    name == "pc.ram" || dossier.ram.iter().any(is_block)
}

/// Where guest RAM lies in the guest, by the rule of its VMM.
pub fn by_rule(held: &Held, dossier: &Dossier) -> Result<Vec<Placed>, PhysicalError> {
    has_ram(dossier)?;
    let program = held.program()?;
    let kind = vmm::recognise(&program.path, &program.argv);
    let kind = kind.ok_or(Refusal::NotVmm { process: held.process(), program: program.path.clone() })?;
    let options = Options::new(&program.argv);
    let blocks = (kind.claim)(&options).blocks;
    match dossier.vmm {
        Vmm::Qemu => of_qemu(&options, &blocks, &dossier.ram, &dossier.notes)
            .map_err(|why| PhysicalError::Unseen { why }),
        vmm => of_other(vmm, kind.layout.cuts, &blocks, &dossier.ram)
            .map_err(|why| PhysicalError::Unknown { why }),
    }
}

fn has_ram(dossier: &Dossier) -> Result<(), PhysicalError> {
    if !dossier.ram.is_empty() {
        return Ok(());
    }
    let why = match dossier.vmm {
        Vmm::Plimsoll => {
            "it was born under plimsoll, and only it knows where its memory is: give its inspection socket with --inspect"
        }
        _ => "none was found in its process",
    };
    Err(PhysicalError::NoRam { name: dossier.name.clone(), why: why.to_owned() })
}

/// Whether ranges that the operator gave are together as long as the blocks that are there from the start.
fn is_whole(blocks: &[Block], ram: &[RamRange]) -> bool {
    let size: Option<ByteCount> = blocks.iter().map(|block| block.size).sum();
    let is_given = ram.iter().any(|ram| ram.block == GIVEN);
    !is_given || size == Some(ram.iter().map(|ram| ram.hva.len()).sum())
}

/// The rule of a VMM with one hole, which cuts RAM at one of these addresses, or what stands in its way.
fn of_other(vmm: Vmm, cuts: &[ByteCount], blocks: &[Block], ram: &[RamRange]) -> Result<Vec<Placed>, String> {
    if blocks.iter().any(|block| block.grows_to.is_some() || block.origin == Origin::Device) {
        return Err(format!("a {vmm} with hot memory does not say where that is"));
    }
    if !is_whole(blocks, ram) {
        return Err("whether the ranges given are all of its RAM does not show".to_owned());
    }
    let ranges: Vec<&RamRange> = ram.iter().collect();
    let lens: Vec<ByteCount> = ranges.iter().map(|ram| ram.hva.len()).collect();
    let hole = cut(cuts, &lens)
        .ok_or_else(|| format!("a {vmm} may have laid RAM of this size out in several ways"))?;
    Ok(place(&ranges, hole, None))
}

/// QEMU's rule, or what stands in its way.
fn of_qemu(
    options: &Options<'_>,
    blocks: &[Block],
    ram: &[RamRange],
    notes: &[Note],
) -> Result<Vec<Placed>, String> {
    let machine = Machine::of(options)?;
    if notes.iter().any(|note| matches!(note, Note::Interchangeable { .. })) {
        return Err("it has blocks of equal size".to_owned());
    }
    if notes.contains(&Note::HotPlug) || blocks.iter().any(|block| block.origin == Origin::Device) {
        return Err("memory devices choose their own addresses".to_owned());
    }
    let ranges = in_order(options, blocks, ram)
        .ok_or_else(|| "its blocks were not found as they are on its command line".to_owned())?;
    let size: ByteCount = ranges.iter().map(|ram| ram.hva.len()).sum();
    if size.0 >= HYPERTRANSPORT - HOLE_64 {
        return Err("with an AMD processor RAM of this size may go on at 1 TiB".to_owned());
    }
    Ok(place(&ranges, machine.hole(size), Some(LEGACY)))
}

/// QEMU's machines that have a rule here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Machine {
    Pc,
    Q35,
}

impl Machine {
    /// The machine that the command line asks for, or why there is no rule for it.
    fn of(options: &Options<'_>) -> Result<Self, String> {
        let machines: Vec<Properties> = options.properties(&["machine", "M"]).collect();
        if machines.iter().any(|machine| machine.get("max-ram-below-4g").is_some()) {
            return Err("max-ram-below-4g is set".to_owned());
        }
        if options.has("readconfig") {
            return Err("a file that -readconfig names may say what machine it is".to_owned());
        }
        // What reaches the HyperTransport hole moves RAM, and either of these may make it do so.
        let is_hole = |text: &str| text.contains("pci-hole64-size");
        if options.lists(&["global", "set"]).any(is_hole)
            || machines.iter().any(|machine| machine.is_on("cxl"))
        {
            return Err("the 64-bit hole of its PCI is not the usual one".to_owned());
        }
        let kind = machines.iter().filter_map(|machine| machine.first_or("type")).next_back().unwrap_or("pc");
        match kind {
            "pc" => Ok(Self::Pc),
            "q35" => Ok(Self::Q35),
            // Those of before 2014 cut at 3.5 GiB.
            old if old.starts_with("pc-i440fx-1.") || old.starts_with("pc-q35-1.") => {
                Err(format!("the machine is an old one, {old}"))
            }
            named if named.starts_with("pc-i440fx-") => Ok(Self::Pc),
            named if named.starts_with("pc-q35-") => Ok(Self::Q35),
            other => Err(format!("the machine is a {other}")),
        }
    }

    /// Where RAM of this size is cut.
    const fn hole(self, size: ByteCount) -> u64 {
        match self {
            Self::Pc if size.0 >= 0xe000_0000 => 0xc000_0000,
            Self::Q35 if size.0 >= 0xb000_0000 => 0x8000_0000,
            Self::Pc | Self::Q35 => ABOVE,
        }
    }
}

/// The ranges of the base blocks in the guest's order: by node, whatever the order of the command line. `None` if they do not correspond,
/// each to one range of its size.
fn in_order<'a>(options: &Options<'_>, blocks: &[Block], ram: &'a [RamRange]) -> Option<Vec<&'a RamRange>> {
    let is_all = |block: &Block, ram: &RamRange| block.size == Some(ram.hva.len());
    if let ([block], [only]) = (blocks, ram) {
        return is_all(block, only).then(|| vec![only]);
    }
    let mut order = nodes(options)?;
    order.sort_by_key(|(node, _)| *node);
    if order.len() != blocks.len() || order.len() != ram.len() {
        return None;
    }
    let find = |name: &str| {
        let block = blocks.iter().find(|block| block.name == name)?;
        ram.iter().find(|ram| ram.block == name && is_all(block, ram))
    };
    order.iter().map(|(_, name)| find(name)).collect()
}

/// The guest's nodes: their numbers and back ends. One without a number gets that of the nodes before it (hw/core/numa.c).
fn nodes(options: &Options<'_>) -> Option<Vec<(u32, String)>> {
    let nodes = options.properties(&["numa"]).filter(|numa| numa.first_or("type") == Some("node"));
    let node = |(place, node): (u32, Properties)| {
        let number = node.get("nodeid").map_or(Some(place), |number| number.parse().ok());
        Some((number?, node.get("memdev")?.to_owned()))
    };
    (0..).zip(nodes).map(node).collect()
}

/// Where RAM in these ranges is cut, if there is one answer.
fn cut(cuts: &[ByteCount], ranges: &[ByteCount]) -> Option<u64> {
    let size: ByteCount = ranges.iter().copied().sum();
    match ranges {
        [first, _] => cuts.iter().find(|cut| *cut == first).map(|cut| cut.0),
        [_] if cuts.iter().all(|cut| size <= *cut) => Some(ABOVE),
        // Its pieces, joined by the kernel: mmap hands out addresses from above, so what the guest has first may lie behind.
        _ => None,
    }
}

/// Lays ranges one after the other from 0 on, and from 4 GiB on what does not fit below the hole.
fn place(ranges: &[&RamRange], hole: u64, legacy: Option<(u64, u64)>) -> Vec<Placed> {
    let mut pieces = Vec::new();
    let mut next = 0u64;
    for ram in ranges {
        let mut rest = ram.hva;
        while !rest.is_empty() {
            if next == hole {
                next = next.max(ABOVE);
            }
            let end = if next < hole { hole } else { u64::MAX };
            let part = rest.len().0.min(end - next);
            push(&mut pieces, next, part, rest, &ram.block, legacy);
            next += part;
            let Some(left) = rest.skip(ByteCount(part)) else { break };
            rest = left;
        }
    }
    pieces
}

/// One stretch without what lies in the legacy hole.
fn push(
    pieces: &mut Vec<Placed>,
    gpa: u64,
    len: u64,
    hva: HvaRange,
    block: &str,
    legacy: Option<(u64, u64)>,
) {
    let end = gpa + len;
    let parts = match legacy {
        Some((start, behind)) if gpa < behind && start < end => {
            [(gpa, start.max(gpa)), (behind.min(end), end)]
        }
        _ => [(gpa, end), (end, end)],
    };
    for (from, to) in parts.into_iter().filter(|(from, to)| from < to) {
        let hva = hva
            .skip(ByteCount(from - gpa))
            .and_then(|rest| HvaRange::new(rest.start(), ByteCount(to - from)));
        pieces.extend(hva.map(|hva| Placed { gpa: Gpa(from), hva, block: block.to_owned() }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RamBacking;
    use plimsoll_types::Hva;

    fn ram(at: u64, len: u64) -> RamRange {
        RamRange {
            hva: HvaRange::new(Hva(at), ByteCount(len)).unwrap(),
            block: format!("at{at:x}"),
            backing: RamBacking::PrivateAnonymous,
            node: None,
            resident: ByteCount(0),
            swapped: ByteCount(0),
            hazards: Vec::new(),
        }
    }

    fn shown(pieces: &[Placed]) -> Vec<(u64, u64, u64)> {
        pieces.iter().map(|piece| (piece.gpa.0, piece.hva.start().0, piece.hva.len().0)).collect()
    }

    fn machine(line: &str) -> Result<Machine, String> {
        let argv: Vec<String> = line.split(' ').map(str::to_owned).collect();
        Machine::of(&Options::new(&argv))
    }

    const GIB: u64 = 1 << 30;
    const AT: u64 = 0x7f00_0000_0000;

    #[test]
    fn a_small_pc_has_its_ram_from_zero_on_without_the_legacy_hole() {
        let pieces = place(&[&ram(AT, GIB)], Machine::Q35.hole(ByteCount(GIB)), Some(LEGACY));
        assert_eq!(shown(&pieces), [(0, AT, 0xa_0000), (0x10_0000, AT + 0x10_0000, GIB - 0x10_0000)]);
    }

    #[test]
    fn ram_beyond_the_hole_goes_on_at_4_gib() {
        for (machine, size, below) in [
            (Machine::Pc, 8 * GIB, 3 * GIB),
            (Machine::Q35, 8 * GIB, 2 * GIB),
            (Machine::Pc, 0xe000_0000, 3 * GIB),
            (Machine::Q35, 0xb000_0000, 2 * GIB),
        ] {
            let pieces = place(&[&ram(AT, size)], machine.hole(ByteCount(size)), None);
            assert_eq!(shown(&pieces), [(0, AT, below), (ABOVE, AT + below, size - below)], "{machine:?}");
        }
        let whole = 0xe000_0000 - 4096;
        assert_eq!(place(&[&ram(AT, whole)], Machine::Pc.hole(ByteCount(whole)), None).len(), 1);
    }

    #[test]
    fn nodes_follow_each_other_and_one_may_lie_on_both_sides_of_the_hole() {
        let (one, other) = (ram(AT, GIB), ram(2 * AT, 3 * GIB));
        let pieces = place(&[&one, &other], Machine::Q35.hole(ByteCount(4 * GIB)), None);
        let expected = [(0, AT, GIB), (GIB, 2 * AT, GIB), (ABOVE, 2 * AT + GIB, 2 * GIB)];
        assert_eq!(shown(&pieces), expected);
    }

    #[test]
    fn the_machine_is_told_by_the_command_line() {
        assert_eq!(machine("qemu -m 64"), Ok(Machine::Pc));
        assert_eq!(machine("qemu -machine pc-i440fx-7.2,usb=off"), Ok(Machine::Pc));
        assert_eq!(machine("qemu -machine accel=kvm -M type=pc-q35-8.0"), Ok(Machine::Q35));
        for line in [
            "qemu -M microvm",
            "qemu -M q35,max-ram-below-4g=1G",
            "qemu -M pc-i440fx-1.4",
            "qemu -M pc-q35-1.7",
        ] {
            assert!(machine(line).is_err(), "{line}");
        }
    }

    fn by_qemus_rule(line: &str, ram: &[RamRange]) -> Result<Vec<(u64, u64, u64)>, String> {
        let argv: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let options = Options::new(&argv);
        let program = std::path::Path::new("/usr/bin/qemu-system-x86_64");
        let claim = (vmm::recognise(program, &argv).unwrap().claim)(&options);
        of_qemu(&options, &claim.blocks, ram, &claim.notes).map(|pieces| shown(&pieces))
    }

    fn named(block: &str, at: u64, len: u64) -> RamRange {
        RamRange { block: block.to_owned(), ..ram(at, len) }
    }

    #[test]
    fn nodes_lie_by_number_and_not_as_they_were_named() {
        let ram = [named("a", AT, GIB), named("b", 2 * AT, GIB / 2)];
        let line = |nodes: &str| {
            format!(
                "qemu -m 1536 -object memory-backend-ram,id=a,size=1G -object memory-backend-ram,id=b,size=512M {nodes}"
            )
        };
        let first = |nodes| by_qemus_rule(&line(nodes), &ram).map(|pieces| pieces[0].1);
        assert_eq!(first("-numa node,nodeid=1,memdev=a -numa node,nodeid=0,memdev=b"), Ok(2 * AT));
        assert_eq!(first("-numa node,nodeid=0,memdev=a -numa node,nodeid=1,memdev=b"), Ok(AT));
        assert_eq!(first("-numa node,memdev=a -numa node,memdev=b"), Ok(AT));
        assert!(first("-numa node,nodeid=x,memdev=a -numa node,memdev=b").is_err());
        assert!(by_qemus_rule(&line("-numa node,memdev=a -numa node,memdev=b"), &ram[..1]).is_err());
    }

    #[test]
    fn a_part_of_a_block_that_was_given_is_not_taken_for_the_whole() {
        assert!(by_qemus_rule("qemu -m 1G", &[named(GIVEN, AT, GIB)]).is_ok());
        assert!(by_qemus_rule("qemu -m 1G", &[named(GIVEN, AT, GIB / 2)]).is_err());
        let block = |size| [Block { size, ..Block::unsaid("ram") }];
        assert!(is_whole(&block(Some(ByteCount(GIB))), &[named(GIVEN, AT, GIB)]));
        assert!(is_whole(&block(None), &[named("ram", AT, GIB)]));
        for size in [None, Some(ByteCount(2 * GIB))] {
            assert!(!is_whole(&block(size), &[named(GIVEN, AT, GIB)]), "{size:?}");
        }
    }

    #[test]
    fn memory_devices_have_no_rule() {
        let ram = [named("ram", AT, GIB), named("d", 2 * AT, GIB)];
        let device = "-object memory-backend-ram,id=d,size=1G -device pc-dimm,memdev=d";
        assert!(by_qemus_rule(&format!("qemu -m 1G {device}"), &ram).is_err());
        assert!(by_qemus_rule("qemu -m 1G,maxmem=2G,slots=2", &ram[..1]).is_err());
        assert!(by_qemus_rule("qemu -m 1G", &ram[..1]).is_ok());
    }

    #[test]
    fn ram_that_may_move_to_1_tib_has_no_rule() {
        let by_rule = |gib: u64, more: &str| {
            by_qemus_rule(&format!("qemu -m {gib}G {more}"), &[named("ram", AT, gib * GIB)])
                .map(|pieces| pieces.len())
        };
        assert_eq!(by_rule(974, "-cpu host"), Ok(3));
        assert!(by_rule(975, "-cpu host").is_err());
        for more in ["-global q35-pcihost.pci-hole64-size=1T", "-M q35,cxl=on", "-readconfig file"] {
            assert!(by_rule(8, more).is_err(), "{more}");
        }
    }

    #[test]
    fn a_cut_that_could_be_in_two_places_is_not_guessed() {
        let (three, more) = (ByteCount(3 * GIB), ByteCount::mib(3328));
        assert_eq!(cut(&[three, more], &[ByteCount(GIB)]), Some(ABOVE));
        assert_eq!(cut(&[three, more], &[ByteCount(4 * GIB)]), None);
        assert_eq!(cut(&[three, more], &[more, ByteCount(GIB)]), Some(more.0));
        assert_eq!(cut(&[three], &[ByteCount(4 * GIB)]), None, "joined, in an order that does not show");
        assert_eq!(cut(&[three], &[three]), Some(ABOVE));
        assert_eq!(cut(&[three], &[three, ByteCount(GIB)]), Some(3 * GIB));
        assert_eq!(cut(&[three], &[ByteCount(GIB), ByteCount(GIB)]), None);
    }
}
