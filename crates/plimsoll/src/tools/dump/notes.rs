//! Registers as notes of a core file: NT_PRSTATUS, which debuggers read, and QEMU's own, which has all registers.
//!
//! ```text
//! NT_PRSTATUS of x86-64 Linux, 336 bytes: 32 process id (4), 112 registers (27 * 8: r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx
//!   rdx rsi rdi orig_rax rip cs rflags rsp ss fs_base gs_base ds es fs gs)
//! QEMUCPUState (target/i386/arch_dump.c), 440 bytes: version 1 (4), size (4), rax rbx rcx rdx rsi rdi rsp rbp r8..r15 rip rflags,
//!   cs ds es fs gs ss ldt tr gdt idt, each selector (4) limit (4) flags (4) 0 (4) base (8), cr0..cr4, kernel_gs_base
//! ```
use plimsoll_attach::qmp::{Registers, Segment};
use plimsoll_inspect::note;

const NT_PRSTATUS: u32 = 1;
const PRSTATUS: usize = 336;
const PRSTATUS_REGISTERS: usize = 112;
/// Everything of QEMU's note but kernel_gs_base, which its monitor does not tell and which is zero.
const QEMU_STATE: u32 = 440;

/// Both notes of a processor. Debuggers call it by a process id: its number and one.
pub(super) fn notes(processor: u32, registers: &Registers) -> Vec<u8> {
    let mut bytes = note("CORE", NT_PRSTATUS, &status(processor, registers));
    bytes.extend(note("QEMU", 0, &state(registers)));
    bytes
}

fn status(processor: u32, registers: &Registers) -> Vec<u8> {
    let [rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8, r9, r10, r11, r12, r13, r14, r15] = registers.general;
    let [es, cs, ss, ds, fs, gs, _, _] = registers.segments;
    let mut bytes = vec![0; PRSTATUS_REGISTERS];
    bytes.splice(32..36, processor.saturating_add(1).to_le_bytes());
    let no_call = u64::MAX;
    let ordered = [
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        no_call,
        registers.rip,
        cs.selector,
        registers.rflags,
        rsp,
        ss.selector,
        fs.base,
        gs.base,
        ds.selector,
        es.selector,
        fs.selector,
        gs.selector,
    ];
    bytes.extend(ordered.iter().flat_map(|value| value.to_le_bytes()));
    bytes.resize(PRSTATUS, 0);
    bytes
}

fn state(registers: &Registers) -> Vec<u8> {
    let [rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, others @ ..] = registers.general;
    let [es, cs, ss, ds, fs, gs, ldt, tr] = registers.segments;
    let mut bytes = [1u32, QEMU_STATE].iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let general = [rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp].into_iter().chain(others);
    bytes.extend(general.chain([registers.rip, registers.rflags]).flat_map(u64::to_le_bytes));
    let tables = registers.tables.map(|(base, limit)| Segment { base, limit, ..Segment::default() });
    for segment in [cs, ds, es, fs, gs, ss, ldt, tr].into_iter().chain(tables) {
        for value in [segment.selector, segment.limit, segment.flags, 0] {
            bytes.extend(value.to_le_bytes().iter().take(4));
        }
        bytes.extend(segment.base.to_le_bytes());
    }
    let [cr0, cr2, cr3, cr4] = registers.control;
    bytes.extend([cr0, 0, cr2, cr3, cr4, 0].into_iter().flat_map(u64::to_le_bytes));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_have_the_sizes_that_readers_expect() {
        let registers = Registers {
            rip: 0x1122,
            general: std::array::from_fn(|place| place as u64),
            ..Registers::default()
        };
        let status = status(3, &registers);
        assert_eq!(
            (status.len(), status[32], &status[112 + 16 * 8..112 + 16 * 8 + 2]),
            (PRSTATUS, 4, &[0x22, 0x11][..])
        );
        let state = state(&registers);
        assert_eq!((state.len(), state[0], state[8 + 16 * 8]), (440, 1, 0x22));
    }
}
