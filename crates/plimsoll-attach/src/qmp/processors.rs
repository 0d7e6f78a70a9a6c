//! What the monitor tells of processors and of the guest's physical memory. QEMU has no QMP for either: these are texts of its
//! human monitor, read strictly, and shown where they are not what they should be.

use super::queries::unexpected;
use super::{Qmp, QmpError};
use plimsoll_types::{ByteCount, Gpa, Hva};
use serde_json::{Value, json};

/// The command of QMP that hands a line to the human monitor.
pub(super) const HMP: &str = "human-monitor-command";
/// Names of the general registers in 64-bit mode, in the order in which [`Registers::general`] has them.
pub const GENERAL: [&str; 16] = [
    "RAX", "RBX", "RCX", "RDX", "RSI", "RDI", "RBP", "RSP", "R8", "R9", "R10", "R11", "R12", "R13", "R14",
    "R15",
];
/// Names of the segments, in the order in which [`Registers::segments`] has them.
pub const SEGMENTS: [&str; 8] = ["ES", "CS", "SS", "DS", "FS", "GS", "LDT", "TR"];

/// A segment register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// The selector.
    pub selector: u64,
    /// Where it begins.
    pub base: u64,
    /// How long it is, less one.
    pub limit: u64,
    /// The descriptor's upper word, as QEMU keeps it.
    pub flags: u64,
}

/// The registers of an x86-64 processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// The general ones, see [`GENERAL`].
    pub general: [u64; 16],
    /// The instruction pointer.
    pub rip: u64,
    /// The flags.
    pub rflags: u64,
    /// The segments, see [`SEGMENTS`].
    pub segments: [Segment; 8],
    /// The descriptor tables: of segments, of interrupts. Base and limit.
    pub tables: [(u64, u64); 2],
    /// CR0, CR2, CR3, CR4.
    pub control: [u64; 4],
    /// EFER.
    pub efer: u64,
    /// The current privilege level.
    pub privilege: u64,
}

/// A range of the guest's physical address space that is memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatRange {
    /// Where it begins.
    pub gpa: Gpa,
    /// How much it is.
    pub len: ByteCount,
    /// QEMU's name of the memory under it.
    pub name: String,
    /// Whether the guest can write it.
    pub kind: FlatKind,
}

/// What a range is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlatKind {
    /// RAM.
    Ram,
    /// Memory that it can only read.
    Rom,
}

impl Qmp {
    /// A command of the human monitor, on a processor's behalf where it matters whose.
    pub fn human(&mut self, line: &str, processor: Option<u32>) -> Result<String, QmpError> {
        let mut arguments = json!({ "command-line": line });
        if let Some(index) = processor {
            arguments["cpu-index"] = index.into();
        }
        match self.execute(HMP, arguments)? {
            Value::String(text) => Ok(text),
            other => Err(unexpected(HMP, "text", &other)),
        }
    }

    /// The numbers of the processors.
    pub fn processors(&mut self) -> Result<Vec<u32>, QmpError> {
        self.list("query-cpus-fast", "a list of processors with cpu-index", |answer| {
            u32::try_from(answer.get("cpu-index")?.as_u64()?).ok()
        })
    }

    /// The registers of a processor.
    pub fn registers(&mut self, processor: u32) -> Result<Registers, QmpError> {
        let text = self.human("info registers", Some(processor))?;
        parse_registers(&text)
            .ok_or_else(|| unexpected(HMP, "the registers of an x86 processor", &text.into()))
    }

    /// What of the guest's physical address space is RAM or ROM, as its processors see it.
    pub fn flat_view(&mut self) -> Result<Vec<FlatRange>, QmpError> {
        let text = self.human("info mtree -f", None)?;
        parse_flat_view(&text)
            .ok_or_else(|| unexpected(HMP, "a flat view of the address space \"memory\"", &text.into()))
    }

    /// Where a guest physical address lies in QEMU's process.
    pub fn hva(&mut self, gpa: Gpa) -> Result<Hva, QmpError> {
        let text = self.human(&format!("gpa2hva {:#x}", gpa.0), None)?;
        let address = || hexadecimal(text.trim_end().rsplit_once(" is 0x")?.1).map(Hva);
        address().ok_or_else(|| unexpected(HMP, "a host virtual address", &text.as_str().into()))
    }

    /// Stops all processors.
    pub fn stop(&mut self) -> Result<(), QmpError> {
        self.execute("stop", json!({})).map(drop)
    }

    /// Lets them go on.
    pub fn resume(&mut self) -> Result<(), QmpError> {
        self.execute("cont", json!({})).map(drop)
    }
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

/// Reads `info registers`: `NAME=HEX` pairs, a name followed by blanks here and there, and rows of segments and tables; or
/// `None` if one is missing. In 32-bit modes names are shorter by a letter.
pub fn parse_registers(text: &str) -> Option<Registers> {
    let named = |name: &str| {
        let mut words = text.split_ascii_whitespace();
        words.find_map(|word| word.strip_prefix(name)?.strip_prefix('=').and_then(hexadecimal))
    };
    let wide = |wide: &str, narrow: &str| named(wide).or_else(|| named(narrow));
    // Without the blanks after names: `R8 =…`, `ES =…`, `GDT=     …`.
    let row = |name: &str| {
        let rows =
            text.lines().filter_map(|line| line.trim().strip_prefix(name)?.trim_start().strip_prefix('='));
        rows.map(|rest| rest.split_ascii_whitespace().map_while(hexadecimal).collect::<Vec<u64>>()).next()
    };
    let mut found = Registers::default();
    for (name, register) in GENERAL.iter().zip(&mut found.general) {
        let narrow =
            name.strip_prefix('R').filter(|rest| rest.starts_with(|c: char| c.is_ascii_alphabetic()));
        *register = match narrow {
            Some(rest) => wide(name, &format!("E{rest}"))?,
            // There are none in 32-bit modes.
            None => numbered(text, name).unwrap_or_default(),
        };
    }
    found.rip = wide("RIP", "EIP")?;
    found.rflags = wide("RFL", "EFL")?;
    for (name, segment) in SEGMENTS.iter().zip(&mut found.segments) {
        let &[selector, base, limit, flags, ..] = row(name)?.as_slice() else { return None };
        *segment = Segment { selector, base, limit, flags };
    }
    for (name, table) in ["GDT", "IDT"].iter().zip(&mut found.tables) {
        let &[base, limit, ..] = row(name)?.as_slice() else { return None };
        *table = (base, limit);
    }
    for (name, register) in ["CR0", "CR2", "CR3", "CR4"].iter().zip(&mut found.control) {
        *register = named(name)?;
    }
    found.efer = named("EFER")?;
    found.privilege = named("CPL")?;
    Some(found)
}

/// `R8 =0000000000000000 R9 =…`: the blank is there for names of two letters.
fn numbered(text: &str, name: &str) -> Option<u64> {
    let (_, rest) = text.split_once(&format!("{name:<3}="))?;
    hexadecimal(rest.get(..16)?)
}

/// Reads the view that the processors have out of `info mtree -f`; `None` if it is not there.
///
/// ```text
/// FlatView #2
///  AS "memory", root: system
///  AS "cpu-memory-0", root: system
///  Root memory region: system
///   0000000000000000-00000000000bffff (prio 0, ram): pc.ram
///   00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000
/// ```
pub fn parse_flat_view(text: &str) -> Option<Vec<FlatRange>> {
    let mut views = text.split("FlatView #").skip(1);
    let view = views.find(|view| view.lines().any(|line| line.trim().starts_with("AS \"memory\",")))?;
    Some(view.lines().filter_map(flat_range).collect())
}

fn flat_range(line: &str) -> Option<FlatRange> {
    let (addresses, rest) = line.trim().split_once(" (prio ")?;
    let (first, last) = addresses.split_once('-')?;
    let (first, last) = (hexadecimal(first)?, hexadecimal(last)?);
    let (attributes, name) = rest.split_once("): ")?;
    let kind = match attributes.split_once(", ")?.1 {
        "ram" => FlatKind::Ram,
        "rom" => FlatKind::Rom,
        _ => return None,
    };
    let name = name.split_once(" @").map_or(name, |(name, _)| name).split(" KVM").next()?.trim();
    let len = ByteCount(last.checked_sub(first)?.checked_add(1)?);
    Some(FlatRange { gpa: Gpa(first), len, name: name.to_owned(), kind })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, proptest};

    /// As QEMU 7.2 writes it for a Linux in 64-bit mode, floating point left out.
    const LONG: &str = "\r\nCPU#0\r\n\
        RAX=ffffffff819d4b50 RBX=0000000000000000 RCX=0000000000000001 RDX=00000000000005cc\r\n\
        RSI=0000000000000001 RDI=00000000000005d4 RBP=ffffffff82614440 RSP=ffffffff82603e80\r\n\
        R8 =ffff88800b82a0e8 R9 =0000000000000001 R10=0000000000000018 R11=0000000000000002\r\n\
        R12=0000000000000000 R13=0000000000000000 R14=0000000000000000 R15=00000000000147b0\r\n\
        RIP=ffffffff819d4ddb RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1\r\n\
        ES =0000 0000000000000000 ffffffff 00000000\r\n\
        CS =0010 0000000000000000 ffffffff 00af9b00 DPL=0 CS64 [-RA]\r\n\
        SS =0018 0000000000000000 ffffffff 00cf9300 DPL=0 DS   [-WA]\r\n\
        DS =0000 0000000000000000 ffffffff 00000000\r\n\
        FS =0000 00000000022663c0 ffffffff 00000000\r\n\
        GS =0000 ffff88800b800000 ffffffff 00000000\r\n\
        LDT=0000 0000000000000000 00000000 00000000\r\n\
        TR =0040 fffffe0000003000 00004087 00008900 DPL=0 TSS64-avl\r\n\
        GDT=     fffffe0000001000 0000007f\r\n\
        IDT=     fffffe0000000000 00000fff\r\n\
        CR0=80050033 CR2=00007ffd9e3c7ff8 CR3=0000000002e2a000 CR4=000006f0\r\n\
        DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000 \r\n\
        DR6=00000000ffff0ff0 DR7=0000000000000400\r\nEFER=0000000000000d01\r\n";

    const VIEWS: &str = "FlatView #0\r\n AS \"I/O\", root: io\r\n Root memory region: io\r\n\
        \x20 0000000000000000-0000000000000007 (prio 0, i/o): dma-chan\r\n\r\n\
        FlatView #1\r\n AS \"memory\", root: system\r\n AS \"cpu-memory-0\", root: system\r\n Root memory region: system\r\n\
        \x20 0000000000000000-00000000000bffff (prio 0, ram): pc.ram KVM\r\n\
        \x20 00000000000c0000-00000000000dffff (prio 1, rom): pc.rom\r\n\
        \x20 0000000000100000-000000000bffffff (prio 0, ram): pc.ram @0000000000100000 KVM\r\n\
        \x20 00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic\r\n\r\n\
        FlatView #2\r\n AS \"mch\", root: bus master container\r\n Root memory region: (none)\r\n  No rendered FlatView\r\n";

    #[test]
    fn registers_of_a_linux_are_read() {
        let found = parse_registers(LONG).unwrap();
        assert_eq!((found.general[0], found.general[15]), (0xffff_ffff_819d_4b50, 0x147b0));
        assert_eq!((found.general[8], found.general[9]), (0xffff_8880_0b82_a0e8, 1));
        assert_eq!((found.rip, found.rflags), (0xffff_ffff_819d_4ddb, 0x246));
        assert_eq!(found.control, [0x8005_0033, 0x7ffd_9e3c_7ff8, 0x2e2_a000, 0x6f0]);
        assert_eq!((found.efer, found.privilege), (0xd01, 0));
        let code = Segment { selector: 0x10, base: 0, limit: 0xffff_ffff, flags: 0x00af_9b00 };
        assert_eq!((found.segments[1], found.segments[5].base), (code, 0xffff_8880_0b80_0000));
        assert_eq!(found.tables, [(0xffff_fe00_0000_1000, 0x7f), (0xffff_fe00_0000_0000, 0xfff)]);
    }

    #[test]
    fn registers_of_a_processor_that_was_reset_are_read_too() {
        let narrow = LONG.replace("RIP=ffffffff819d4ddb RFL", "EIP=0000fff0 EFL");
        let rows = narrow.lines().filter(|line| !line.starts_with("R8 ") && !line.starts_with("R12"));
        let found = parse_registers(&rows.collect::<Vec<_>>().join("\n")).unwrap();
        assert_eq!((found.rip, found.general[8]), (0xfff0, 0));
    }

    #[test]
    fn registers_of_which_one_is_missing_are_none() {
        for name in ["RAX", "RSP", "CR3", "EFER", "CS ", "IDT", "RIP"] {
            assert_eq!(parse_registers(&LONG.replace(name, "ZZZ")), None, "{name}");
        }
    }

    #[test]
    fn only_memory_of_the_processors_view_is_told() {
        let found = parse_flat_view(VIEWS).unwrap();
        let shown: Vec<_> =
            found.iter().map(|range| (range.gpa.0, range.len.0, range.name.as_str(), range.kind)).collect();
        let expected = [
            (0, 0xc0000, "pc.ram", FlatKind::Ram),
            (0xc0000, 0x20000, "pc.rom", FlatKind::Rom),
            (0x10_0000, 0xbf0_0000, "pc.ram", FlatKind::Ram),
        ];
        assert_eq!(shown, expected);
        assert_eq!(parse_flat_view("unknown command: 'info mtree'"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in any::<String>(), at in 0..LONG.len(), cut in 0..64usize) {
            let _ = (parse_registers(&text), parse_flat_view(&text));
            if let (Some(before), Some(after)) = (LONG.get(..at), LONG.get(at + cut..)) {
                let _ = parse_registers(&format!("{before}{text}{after}"));
            }
        }
    }
}
