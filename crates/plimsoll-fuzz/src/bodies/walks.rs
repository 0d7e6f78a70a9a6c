//! Walks through hostile tables of each architecture: no more reads than levels, nothing written, the same answer twice.
use super::{Everywhere, stages, words_of};
use plimsoll_mmu::format::{arm as arms, riscv as riscvs, x86 as x86s};
use plimsoll_mmu::{Access, Feature, Format, Input, Marks, Output, Walked, arm, riscv, x86};
use std::convert::Infallible;
use std::fmt::Debug;

/// Words that say what is walked, before those of memory: where to, from where, and how.
const HEAD: usize = 3;
pub(super) const ON_OFF: [Feature; 2] = [Feature::Off, Feature::On];

/// Reads three words and memory.
pub(crate) fn read(bytes: &[u8]) -> bool {
    let mut words = words_of(bytes);
    let memory = Everywhere::new(words.split_off(HEAD.min(words.len())));
    let (Some(memory), [input, root, how]) = (memory, &words[..]) else { return false };
    let (input, root, how) = (*input, *root, *how);
    let (input, access) = (Input(input), [Access::Read, Access::Write, Access::Fetch][bits(how, 0, 3)]);
    stages::ranges(&memory, input, root, how);
    x86_walk::<x86s::Long4>(&memory, input, root, how, access)
        | x86_walk::<x86s::Long5>(&memory, input, root, how, access)
        | arm_walk::<arms::Lower<12, 48>>(&memory, input, root, how, access)
        | arm_walk::<arms::Upper<12, 48>>(&memory, input, root, how, access)
        | arm_walk::<arms::Lower<16, 48>>(&memory, input, root, how, access)
        | riscv_walk::<riscvs::Sv39>(&memory, input, root, how)
        | riscv_walk::<riscvs::Sv48>(&memory, input, root, how)
        | riscv_walk::<riscvs::Sv57>(&memory, input, root, how)
        | stages::walk(&memory, input, root, how, access)
}

/// A number below `limit` from a word, at a bit.
pub(super) fn bits(word: u64, at: u32, limit: u64) -> usize {
    usize::try_from((word >> at) % limit).unwrap()
}

/// Has a walk done twice.
pub(super) fn twice<F: Format, E: Debug + PartialEq>(
    memory: &Everywhere,
    mut walk: impl FnMut() -> Result<Walked, E>,
) -> bool {
    memory.reads.set(0);
    let walked = walk();
    let reads = memory.reads.get();
    assert!(reads <= u64::from(F::LEVELS), "{}: {reads} reads of {} levels", F::NAME, F::LEVELS);
    assert_eq!(walk(), walked, "{}: the same tables lead elsewhere the second time", F::NAME);
    let Ok(walked) = walked else { return false };
    assert!(walked.level.0 >= 1 && walked.level.0 <= F::LEVELS);
    // What was read last is the entry that maps the page.
    assert_eq!(memory.at(walked.step(walked.level).at.0), walked.step(walked.level).raw);
    true
}

fn x86_walk<F: x86s::X86Format>(
    memory: &Everywhere,
    input: Input,
    cr3: u64,
    how: u64,
    access: Access,
) -> bool {
    let control = x86::Control::from_bits_truncate(u8::try_from(how >> 8 & 0xff).unwrap());
    let pkru = u32::try_from(how >> 32).unwrap();
    let registers = x86::Registers { cr3, control, pkru, caps: x86s::Caps::FULL };
    let mode = [x86::Mode::User, x86::Mode::Supervisor, x86::Mode::Implicit][bits(how, 16, 3)];
    twice::<F, x86::Fault<Infallible>>(memory, || {
        x86::walk::<F, _>(memory, &registers, input, (access, mode), Marks::Leave)
    })
}

fn arm_walk<F: Format<Caps = arms::Caps>>(
    memory: &Everywhere,
    input: Input,
    root: u64,
    how: u64,
    access: Access,
) -> bool {
    let registers = arm::Registers {
        root: Output(root & ((1 << 48) - 1)),
        control: arm::Control::from_bits_truncate(u8::try_from(how >> 8 & 0xff).unwrap()),
        access_flag: ON_OFF[bits(how, 17, 2)],
        hierarchy_off: ON_OFF[bits(how, 18, 2)],
        caps: arms::Caps::FULL,
    };
    let mode = [arm::Mode::User, arm::Mode::Privileged][bits(how, 19, 2)];
    twice::<F, arm::Fault<Infallible>>(memory, || {
        arm::walk::<F, _>(memory, &registers, input, (access, mode), Marks::Leave)
    })
}

fn riscv_walk<F: Format<Caps = riscvs::Caps>>(
    memory: &Everywhere,
    input: Input,
    root: u64,
    how: u64,
) -> bool {
    use riscv::Operation;
    let registers = riscv::Registers {
        root: Output((root & ((1 << 56) - 1)) >> 12 << 12),
        control: riscv::Control::from_bits_truncate(u8::try_from(how >> 8 & 0xff).unwrap()),
        updates: ON_OFF[bits(how, 17, 2)],
        caps: riscvs::Caps::FULL,
    };
    let operations = [Operation::Load, Operation::Store, Operation::Fetch, Operation::LoadExecutable];
    let mode = [riscv::Mode::User, riscv::Mode::Supervisor][bits(how, 19, 2)];
    let operation = operations[bits(how, 20, 4)];
    twice::<F, riscv::Fault<Infallible>>(memory, || {
        riscv::walk::<F, _>(memory, &registers, input, (operation, mode), Marks::Leave)
    })
}

/// A chain of tables each of whose entries is one word.
pub(super) fn chain(input: u64, how: u64, word: u64) -> Vec<u8> {
    [input, 0x1000, how, word].map(u64::to_le_bytes).concat()
}

pub(crate) fn examples() -> Vec<Vec<u8>> {
    // Present, writable, user, accessed, dirty.
    let x86 = chain(0x7008, 1, 0x2000 | 0x67);
    // A page or table, with the access flag.
    let arm = chain(0x7008, 1 << 19, 0x2000 | 1 << 10 | 3);
    // Valid, readable, writable, executable, accessed, dirty: a large page.
    let riscv = chain(0x7008, 1 << 19, 0xcf);
    [vec![x86, arm, riscv], stages::examples()].concat()
}
