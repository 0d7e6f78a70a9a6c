//! A page fault: what is missing on the way to the page is made.
//!
//! Enters: an access that faulted. Leaves: its fate. Everything that is installed was read from the guest's tables in this call, from
//! frames that nobody had the right to write when the call began, or that are unsync.
use super::records::{EntryId, Id};
use super::{Answer, Backing, Error, Fence, Kind, Outcome, P2m, Role, Shadow, Writes, root_page};
use crate::address::{Input, Level, MAX_LEVELS, Output};
use crate::entry::{Entry, Leaf, Permissions, Table};
use crate::format::Feature;
use crate::format::x86::X86Format;
use crate::memory::{TableFrames, TableMemory};
use crate::walk::{Access, Marks, Walked};
use crate::x86::{self, Control, Mode, Registers};
use plimsoll_types::Gpa;

/// The shadow tables on the way to a page, by level.
type Path = [Option<Id>; MAX_LEVELS];

/// An access that the guest's tables allow, and how it is to be mapped.
struct Allowed<'r> {
    registers: &'r Registers,
    input: Input,
    access: Access,
    /// The guest's walk, before it left its marks.
    walked: Walked,
    /// The guest's leaf after them, with the permissions of all entries on the way.
    leaf: Leaf,
    backing: Backing,
    /// The level of the shadow leaf.
    level: Level,
}

impl Allowed<'_> {
    /// What the guest accesses.
    const fn at(&self) -> Gpa {
        Gpa(self.walked.output.0)
    }

    /// The first page that the shadow leaf, or a piece in which `level` is the entry, maps.
    fn first_page<F: X86Format>(&self, level: Level) -> u64 {
        self.walked.output.0 >> F::shift(level) << (F::shift(level) - F::PAGE_SHIFT)
    }

    /// What the guest's entry behind the shadow entry of `level` says now; 0 if there is none, in a piece.
    fn word<F: X86Format>(&self, level: Level) -> u64 {
        if level < self.walked.level {
            return 0;
        }
        F::marked(self.walked.step(level).raw, level, &self.registers.caps, self.access)
    }

    /// What may be done by way of the shadow leaf, as far as the guest's tables and the host decide; `None` if there is no such
    /// leaf that lets this access succeed and no other that must not.
    fn permissions(&self) -> Option<Permissions> {
        let Registers { control, caps, .. } = self.registers;
        let mut permissions = self.leaf.permissions;
        if !control.contains(Control::WRITE_PROTECT) && !permissions.contains(Permissions::WRITE) {
            if !permissions.contains(Permissions::USER) {
                permissions |= Permissions::WRITE;
            } else if self.access == Access::Write {
                if control.contains(Control::SMAP) || caps.keys == Feature::On {
                    return None;
                }
                permissions = (permissions | Permissions::WRITE) - Permissions::USER;
                if control.contains(Control::SMEP) {
                    permissions -= Permissions::EXECUTE;
                }
            }
        }
        if !self.leaf.dirty || (self.backing.writes == Writes::Logged && self.access != Access::Write) {
            permissions -= Permissions::WRITE;
        }
        Some(permissions & (self.backing.permissions | Permissions::USER))
    }
}

impl<F: X86Format, M: TableMemory, P: TableFrames> Shadow<'_, F, M, P> {
    /// The guest's access to `input` faulted, on a processor with these registers.
    ///
    /// # Errors
    /// [`Error`].
    pub fn fault<G: P2m>(
        &mut self,
        guest: &G,
        registers: &Registers,
        input: Input,
        (access, mode): (Access, Mode),
    ) -> Answer<G, M> {
        self.begin();
        let root = self.lists.find(root_page(registers), &Role::root::<F>(registers));
        let root = root.filter(|root| self.lists.record(*root).pins > 0);
        let root = root.ok_or(Error::NotLoaded { cr3: registers.cr3 })?;
        let walked = match x86::walk::<F, G>(guest, registers, input, (access, mode), Marks::Set) {
            Ok(walked) => walked,
            Err(fault) => return Ok((Outcome::Refused(fault), Fence::None)),
        };
        let page = Gpa(walked.output.0 >> F::PAGE_SHIFT << F::PAGE_SHIFT);
        let needs = Permissions::READ | access.needs();
        let backing = guest.backing(page).filter(|backing| backing.permissions.contains(needs));
        let Some(backing) = backing else {
            return Ok((Outcome::Missing { at: Gpa(walked.output.0), access }, Fence::None));
        };
        let large = walked.level > Level::PAGES && self.may_be_large(page, &backing);
        let allowed = Allowed {
            registers,
            input,
            access,
            leaf: Leaf {
                permissions: walked.permissions,
                dirty: walked.leaf.dirty || access == Access::Write,
                ..walked.leaf
            },
            walked,
            backing,
            level: if large { Level(2) } else { Level::PAGES },
        };

        let (path, fence) = self.path(root, &allowed)?;
        // With a fence to come somebody may still write to a table that is new here: nothing can be made of its words yet. A table
        // that is new may also be among the pages that were to be one large leaf.
        let undone = fence != Fence::None || (large && !self.may_be_large(page, &allowed.backing));
        match path {
            Some(path) if !undone => self.install(guest, &path, &allowed),
            _ => Ok((Outcome::Resume, fence)),
        }
    }

    /// Whether the 512 pages around `page` can be one leaf: they are one run here, and no table is among them.
    fn may_be_large(&self, page: Gpa, backing: &Backing) -> bool {
        let inside = (1 << F::shift(Level(2))) - 1;
        backing.shift >= F::shift(Level(2))
            && backing.writes == Writes::Free
            && backing.frame.0 & inside == page.0 & inside
            && !self.lists.any_in_block(page.0 >> F::PAGE_SHIFT)
    }

    /// The shadow tables from the root down to the leaf's; `None` if there is no room for all until the fence was executed.
    fn path(&mut self, root: Id, allowed: &Allowed<'_>) -> Result<(Option<Path>, Fence), Error<M::Error>> {
        let mut path = Path::default();
        let (mut table, mut role) = (Some(root), Role::root::<F>(allowed.registers));
        let (mut whole, mut fence) = (true, Fence::None);
        self.lists.record_mut(root).used = self.now;
        loop {
            whole &= table.is_some();
            if let Some(place) = path.get_mut(role.level.subscript()) {
                *place = table;
            }
            let Some(below) = role.level.below().filter(|below| *below >= allowed.level) else { break };
            let raw = allowed.walked.step(role.level).raw;
            let page = match F::decode(raw, role.level, &role.caps) {
                Entry::Table(next) if role.level > allowed.walked.level => {
                    role.inherited &= next.permissions;
                    next.at.0 >> F::PAGE_SHIFT
                }
                _ => {
                    let Leaf { dirty, memory, key, permissions, .. } = allowed.leaf;
                    role.kind = Kind::Piece { dirty, memory, key };
                    role.inherited = permissions;
                    allowed.first_page::<F>(role.level)
                }
            };
            role.level = below;
            let more;
            (table, more) = self.ensure(page, role)?;
            fence = fence.max(more);
        }
        Ok((whole.then_some(path), fence))
    }

    /// Writes the entries of the path, the leaf first.
    fn install<G: P2m>(&mut self, guest: &G, path: &Path, allowed: &Allowed<'_>) -> Answer<G, M> {
        let emulate = (Outcome::Emulate { at: allowed.at() }, Fence::None);
        let Some(mut permissions) = allowed.permissions() else { return Ok(emulate) };
        let page = allowed.at().0 >> F::PAGE_SHIFT;
        if permissions.contains(Permissions::WRITE) && !self.let_go(page, allowed.access) {
            if allowed.access == Access::Write {
                return Ok(emulate);
            }
            permissions -= Permissions::WRITE;
        }
        if permissions.contains(Permissions::WRITE) && allowed.backing.writes == Writes::Logged {
            guest.log(Gpa(page << F::PAGE_SHIFT));
        }
        let (level, shift) = (allowed.level, F::shift(allowed.level));
        let leaf = Entry::Leaf(Leaf {
            output: Output(allowed.backing.frame.0 >> shift << shift),
            shift,
            permissions,
            accessed: true,
            // Nobody reads this one, and set, it is no reason for a processor to write to the entry.
            dirty: true,
            global: false,
            software: 0,
            ..allowed.leaf
        });
        let mut fence = Fence::None;
        if let Some(entry) = on(path, level, F::index(allowed.input, level)) {
            let word = self.encode(&leaf, level)?;
            fence = fence.max(self.exchange(entry, |_| Ok(word))?);
            self.lists.link_leaf(entry, allowed.word::<F>(level), allowed.first_page::<F>(level));
        }
        for level in (level.0 + 1..=F::LEVELS).map(Level) {
            let child = level.below().and_then(|below| *path.get(below.subscript())?);
            let entry = on(path, level, F::index(allowed.input, level));
            let (Some(child), Some(entry)) = (child, entry) else { continue };
            let next = Table::new(self.lists.record(child).frame, Permissions::all(), F::TABLE_MEMORY);
            let next = Entry::Table(Table { accessed: true, ..next });
            let word = self.encode(&next, level)?;
            fence = fence.max(self.exchange(entry, |_| Ok(word))?);
            self.lists.link_parent(entry, allowed.word::<F>(level), child);
        }
        Ok((Outcome::Resume, fence))
    }
}

/// The entry at `index` of the path's table of `level`.
fn on(path: &Path, level: Level, index: u64) -> Option<EntryId> {
    path.get(level.subscript()).copied().flatten().map(|table| EntryId::new(table, index))
}
