//! The few instructions of a guest's that the hypervisor does for it.
//!
//! Enters: 15 bytes at its instruction pointer. Leaves: which it is, and how long; or nothing: the guest ends then. Processors without
//! decode assists say that an instruction was intercepted, and not what it names (AMD APM vol. 3, 1.4 for the encoding).

/// An instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instruction {
    /// MOV from a control register.
    ReadControl {
        /// Which.
        control: u8,
        /// Into which general register.
        register: u8,
    },
    /// MOV to a control register.
    WriteControl {
        /// Which.
        control: u8,
        /// From which general register.
        register: u8,
    },
    /// INVLPG.
    Invalidate(Operand),
}

/// A memory operand: what is added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Operand {
    /// The number of a general register.
    pub base: Option<u8>,
    /// That of another, and log2 of what it is multiplied by.
    pub index: Option<(u8, u8)>,
    /// And this.
    pub displacement: i32,
    /// And where the next instruction is.
    pub relative: bool,
}

/// The instruction, and how many bytes it has.
pub fn decode(bytes: &[u8; 15]) -> Option<(Instruction, u8)> {
    let mut at = Bytes { bytes, next: 0 };
    let mut byte = at.byte()?;
    let mut rex = 0;
    if byte & 0xf0 == 0x40 {
        (rex, byte) = (byte, at.byte()?);
    }
    if byte != 0x0f {
        return None;
    }
    let (opcode, modrm) = (at.byte()?, at.byte()?);
    let (kind, middle, low) = (modrm >> 6, modrm >> 3 & 7, modrm & 7);
    let control = middle | (rex & 4) << 1;
    let register = low | (rex & 1) << 3;
    let instruction = match (opcode, kind, middle) {
        // The upper bits are taken for 3, whatever they say.
        (0x20, ..) => Instruction::ReadControl { control, register },
        (0x22, ..) => Instruction::WriteControl { control, register },
        (0x01, 0..=2, 7) => Instruction::Invalidate(operand(&mut at, (kind, low), rex)?),
        _ => return None,
    };
    Some((instruction, at.next))
}

fn operand(at: &mut Bytes<'_>, (kind, low): (u8, u8), rex: u8) -> Option<Operand> {
    let mut operand = Operand { base: Some(low | (rex & 1) << 3), ..Operand::default() };
    let mut is_wide = kind == 2;
    if low == 4 {
        let sib = at.byte()?;
        let (scale, index, base) = (sib >> 6, sib >> 3 & 7 | (rex & 2) << 2, sib & 7);
        operand.index = (index != 4).then_some((index, scale));
        operand.base = Some(base | (rex & 1) << 3);
        if kind == 0 && base == 5 {
            (operand.base, is_wide) = (None, true);
        }
    } else if kind == 0 && low == 5 {
        (operand.base, operand.relative, is_wide) = (None, true, true);
    }
    operand.displacement = match kind {
        1 => i32::from(at.byte()?.cast_signed()),
        _ if is_wide => i32::from_le_bytes([at.byte()?, at.byte()?, at.byte()?, at.byte()?]),
        _ => 0,
    };
    Some(operand)
}

struct Bytes<'a> {
    bytes: &'a [u8; 15],
    next: u8,
}

impl Bytes<'_> {
    fn byte(&mut self) -> Option<u8> {
        let byte = self.bytes.get(usize::from(self.next)).copied();
        self.next += 1;
        byte
    }
}
