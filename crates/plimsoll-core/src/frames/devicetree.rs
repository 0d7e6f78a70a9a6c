//! What a device tree says of a host's memory.
//!
//! Enters: a flattened device tree, as firmware hands one to a host of Arm's or RISC-V's (Devicetree Specification 0.4: sections 3.4,
//! 3.5, chapter 5). Leaves: [`Claim`]s for a [`HostMap`](super::firmware::HostMap): memory nodes as usable, what lies in the reservation
//! block or below `/reserved-memory` as reserved, also where such a node is disabled: what is doubtful is not used. Where the tree itself
//! lies it does not say: that is a claim of the host's own. What must never happen: a read outside of the bytes, or without end. So
//! everything is looked up by its offset, and each step goes on by a token at least.
//!
//! It is read here and not by a library because those that are kept are under the MPL.
//!
//! Not looked at: aliases of nodes, `ranges` (memory nodes are the root's children, and addresses those of processors), reservations
//! without a place, which the host would make itself, and `hotpluggable`.
use super::firmware::{Claim, Use};
use core::fmt;
use plimsoll_types::{ByteCount, Hpa};

const MAGIC: u32 = 0xd00d_feed;
/// The version that is read, since 2006; later ones say so where they can be read as this one.
const VERSION: u32 = 17;
/// Tokens of the structure block (section 5.4).
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROPERTY: u32 = 3;
const NOP: u32 = 4;
const END: u32 = 9;
/// The root, its children, and those of `/reserved-memory`.
const DEPTH: usize = 3;

/// A tree cannot be read. Claims that it has made by then are worth nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceTreeError {
    /// It is none.
    Magic {
        /// What it begins with.
        found: u32,
    },
    /// It cannot be read as one of version 17.
    Version {
        /// Its version.
        version: u32,
        /// The oldest as which it can be read.
        compatible: u32,
    },
    /// Something is said to be where there are no bytes.
    Short {
        /// The offset, in the tree or in one of its blocks.
        at: usize,
    },
    /// No such token.
    Token {
        /// Its offset in the structure block.
        at: usize,
        /// What is there.
        found: u32,
    },
    /// A node ends that did not begin, something is outside of all nodes, or one does not end.
    Nesting {
        /// The offset in the structure block.
        at: usize,
    },
    /// A node's `reg` is not whole pairs of an address and a size of one or two cells each.
    Reg {
        /// The offset in the structure block at which the node ends.
        at: usize,
    },
}

impl fmt::Display for DeviceTreeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic { found } => {
                write!(f, "no device tree: it begins with {found:#x}, not with {MAGIC:#x}")
            }
            Self::Version { version, compatible } => write!(
                f,
                "the device tree is of version {version}, to be read as {compatible} or later; {VERSION} is what can be read"
            ),
            Self::Short { at } => write!(f, "the device tree ends before what it says is at {at:#x}"),
            Self::Token { at, found } => write!(f, "{found:#x} at {at:#x} is no token of a device tree"),
            Self::Nesting { at } => write!(f, "the device tree's nodes are not nested at {at:#x}"),
            Self::Reg { at } => {
                write!(
                    f,
                    "the device tree's node that ends at {at:#x} has a reg that is not addresses and sizes"
                )
            }
        }
    }
}

impl core::error::Error for DeviceTreeError {}

/// Calls `claim` for each statement about memory.
///
/// # Errors
/// [`DeviceTreeError`]; nothing that was claimed may be used then.
pub fn claims(tree: &[u8], mut claim: impl FnMut(Claim)) -> Result<(), DeviceTreeError> {
    let [magic, size, structure, strings, reserved, version, compatible, _, strings_size, structure_size] =
        header(tree)?;
    if magic != MAGIC {
        return Err(DeviceTreeError::Magic { found: magic });
    }
    if version < VERSION || compatible > VERSION {
        return Err(DeviceTreeError::Version { version, compatible });
    }
    let tree = part(tree, 0, size)?;
    reservations(part(tree, reserved, size.saturating_sub(reserved))?, &mut claim)?;
    let structure = part(tree, structure, structure_size)?;
    nodes(structure, part(tree, strings, strings_size)?, &mut claim)
}

/// Its ten words (section 5.2).
fn header(tree: &[u8]) -> Result<[u32; 10], DeviceTreeError> {
    let mut words = [0; 10];
    for (place, word) in words.iter_mut().enumerate() {
        *word = word_at(tree, place * 4)?;
    }
    Ok(words)
}

fn part(bytes: &[u8], at: u32, length: u32) -> Result<&[u8], DeviceTreeError> {
    let (at, length) = (at as usize, length as usize);
    let end = at.checked_add(length).ok_or(DeviceTreeError::Short { at })?;
    bytes.get(at..end).ok_or(DeviceTreeError::Short { at })
}

fn word_at(bytes: &[u8], at: usize) -> Result<u32, DeviceTreeError> {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    word.map(|word| u32::from_be_bytes(*word)).ok_or(DeviceTreeError::Short { at })
}

/// The text at an offset, to the zero behind it.
fn text_at(bytes: &[u8], at: usize) -> Result<&[u8], DeviceTreeError> {
    let rest = bytes.get(at..).unwrap_or_default();
    let length = rest.iter().position(|byte| *byte == 0).ok_or(DeviceTreeError::Short { at })?;
    rest.get(..length).ok_or(DeviceTreeError::Short { at })
}

/// Pairs of an address and a size, to one of zeros (section 5.3).
fn reservations(block: &[u8], claim: &mut impl FnMut(Claim)) -> Result<(), DeviceTreeError> {
    for pair in block.chunks_exact(16) {
        match (number(pair, 0, 8), number(pair, 8, 16)) {
            (0, 0) => return Ok(()),
            (start, bytes) => claim(reserved(start, bytes)),
        }
    }
    Err(DeviceTreeError::Short { at: block.len() })
}

const fn reserved(start: u64, bytes: u64) -> Claim {
    Claim { start: Hpa(start), bytes: ByteCount(bytes), what: Use::Reserved }
}

/// Bytes as a number, the first counting most.
fn number(bytes: &[u8], start: usize, end: usize) -> u64 {
    bytes.get(start..end).unwrap_or_default().iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// What a node is to memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Root,
    /// A child of the root, memory if its properties say so.
    Child,
    /// `/reserved-memory`.
    Reserved,
    /// A child of that.
    Carved,
    Other,
}

/// A node whose end has not come yet.
#[derive(Clone, Copy)]
struct Node<'a> {
    role: Role,
    is_memory: bool,
    is_off: bool,
    reg: &'a [u8],
    /// How many words its children's addresses and sizes have.
    cells: [u64; 2],
}

impl<'a> Node<'a> {
    /// What one has that says nothing (section 2.3.5).
    const fn new(role: Role) -> Self {
        Self { role, is_memory: false, is_off: false, reg: &[], cells: [2, 1] }
    }

    /// A child of that name.
    fn child(&self, name: &[u8]) -> Self {
        let name = name.split(|byte| *byte == b'@').next().unwrap_or_default();
        Self::new(match self.role {
            Role::Root if name == b"reserved-memory" => Role::Reserved,
            Role::Root => Role::Child,
            Role::Reserved => Role::Carved,
            _ => Role::Other,
        })
    }

    fn has(&mut self, property: &[u8], value: &'a [u8]) {
        match property {
            b"device_type" => self.is_memory = value == b"memory\0",
            b"status" => self.is_off = value != b"okay\0" && value != b"ok\0",
            b"reg" => self.reg = value,
            // One that is not a word is none that can be used.
            b"#address-cells" => self.cells[0] = if value.len() == 4 { number(value, 0, 4) } else { 0 },
            b"#size-cells" => self.cells[1] = if value.len() == 4 { number(value, 0, 4) } else { 0 },
            _ => {}
        }
    }

    /// What it says of memory; `cells` are its parent's. `None` where its `reg` cannot be that.
    fn claim(&self, cells: [u64; 2], claim: &mut impl FnMut(Claim)) -> Option<()> {
        let what = match self.role {
            Role::Child if self.is_memory && !self.is_off => Use::Usable,
            Role::Carved => Use::Reserved,
            _ => return Some(()),
        };
        if self.reg.is_empty() {
            return Some(());
        }
        let [address, size] = cells.map(|cells| match cells {
            1 => Some(4),
            2 => Some(8),
            _ => None,
        });
        let (address, both) = (address?, address? + size?);
        let pairs = self.reg.chunks_exact(both);
        if !pairs.remainder().is_empty() {
            return None;
        }
        for pair in pairs {
            let (start, bytes) = (number(pair, 0, address), number(pair, address, both));
            claim(Claim { what, ..reserved(start, bytes) });
        }
        Some(())
    }
}

/// Goes through the structure block.
fn nodes(structure: &[u8], strings: &[u8], claim: &mut impl FnMut(Claim)) -> Result<(), DeviceTreeError> {
    let mut open = [Node::new(Role::Root); DEPTH];
    let (mut depth, mut at) = (0_usize, 0);
    let mut has_begun = false;
    loop {
        let (here, token) = (at, word_at(structure, at)?);
        at += 4;
        match token {
            BEGIN_NODE => {
                let name = text_at(structure, at)?;
                at = (at + name.len() + 1).next_multiple_of(4);
                let node = match depth.checked_sub(1) {
                    None if !has_begun => Node::new(Role::Root),
                    None => return Err(DeviceTreeError::Nesting { at: here }),
                    Some(above) => open.get(above).map_or(Node::new(Role::Other), |above| above.child(name)),
                };
                if let Some(place) = open.get_mut(depth) {
                    *place = node;
                }
                has_begun = true;
                depth += 1;
            }
            END_NODE => {
                depth = depth.checked_sub(1).ok_or(DeviceTreeError::Nesting { at: here })?;
                let cells =
                    depth.checked_sub(1).and_then(|above| open.get(above)).map_or([0; 2], |it| it.cells);
                let node = open.get(depth).unwrap_or(&Node::new(Role::Other)).claim(cells, claim);
                node.ok_or(DeviceTreeError::Reg { at: here })?;
            }
            PROPERTY => {
                let (length, name) = (word_at(structure, at)?, word_at(structure, at + 4)?);
                at += 8;
                let end = at.checked_add(length as usize).ok_or(DeviceTreeError::Short { at })?;
                let value = structure.get(at..end).ok_or(DeviceTreeError::Short { at })?;
                at = end.next_multiple_of(4);
                let above = depth.checked_sub(1).ok_or(DeviceTreeError::Nesting { at: here })?;
                if let Some(node) = open.get_mut(above) {
                    node.has(text_at(strings, name as usize)?, value);
                }
            }
            NOP => {}
            END if depth == 0 && has_begun => return Ok(()),
            END => return Err(DeviceTreeError::Nesting { at: here }),
            found => return Err(DeviceTreeError::Token { at: here, found }),
        }
    }
}
