//! An entry of a page table in words.
use super::{hex, size_of};
use plimsoll_inspect::Seen;
use plimsoll_mmu::{Entry, Memory, Permissions};
use serde_json::{Value, json};

/// What an entry says: where it leads, and what may be done through it.
pub(super) fn words(entry: &Entry) -> String {
    match entry {
        Entry::Absent { software: 0 } => "absent".to_owned(),
        Entry::Absent { .. } => "absent, its other bits are the guest's own".to_owned(),
        Entry::Malformed(reason) => format!("refused: {reason}"),
        Entry::Table(table) => {
            let flags = [(table.accessed, "accessed")];
            format!("table at {:#x}: {}{}", table.at.0, may(table.permissions), listed(&flags))
        }
        Entry::Leaf(leaf) => {
            let flags = [(leaf.accessed, "accessed"), (leaf.dirty, "dirty"), (leaf.global, "global")];
            let mut text = format!(
                "page of {} at {:#x}: {}{}",
                size_of(leaf.shift),
                leaf.base().0,
                may(leaf.permissions),
                listed(&flags)
            );
            if let Memory::Pat(index @ 1..) = leaf.memory {
                text += &format!(", PAT {index}");
            }
            if leaf.key > 0 {
                text += &format!(", key {}", leaf.key);
            }
            text
        }
    }
}

/// What may be done.
pub(super) fn may(permissions: Permissions) -> String {
    let who = if permissions.contains(Permissions::USER) { "user" } else { "supervisor" };
    let write = if permissions.contains(Permissions::WRITE) { ", write" } else { "" };
    let execute = if permissions.contains(Permissions::EXECUTE) { ", execute" } else { "" };
    format!("{who} read{write}{execute}")
}

fn listed(flags: &[(bool, &str)]) -> String {
    flags.iter().filter(|(is_set, _)| *is_set).map(|(_, name)| format!(", {name}")).collect()
}

/// The same as fields.
pub(super) fn values(seen: &Seen) -> Value {
    let mut value = json!({
        "level": seen.level.0,
        "at": hex(seen.at.0),
        "index": seen.index,
        "raw": hex(seen.raw),
        "text": words(&seen.entry),
        "names_level_again": seen.again.map(|level| level.0),
    });
    let more = match seen.entry {
        Entry::Absent { .. } => json!({ "kind": "absent" }),
        Entry::Malformed(_) => json!({ "kind": "malformed" }),
        Entry::Table(table) => {
            json!({ "kind": "table", "to": hex(table.at.0), "may": may_values(table.permissions), "accessed": table.accessed })
        }
        Entry::Leaf(leaf) => json!({
            "kind": "page",
            "to": hex(leaf.base().0),
            "size": size_of(leaf.shift).0,
            "may": may_values(leaf.permissions),
            "accessed": leaf.accessed,
            "dirty": leaf.dirty,
            "global": leaf.global,
            "key": leaf.key,
        }),
    };
    if let (Some(value), Value::Object(more)) = (value.as_object_mut(), more) {
        value.extend(more);
    }
    value
}

/// What may be done, as a list.
pub(super) fn may_values(permissions: Permissions) -> Value {
    let known = [
        (Permissions::READ, "read"),
        (Permissions::WRITE, "write"),
        (Permissions::EXECUTE, "execute"),
        (Permissions::USER, "user"),
    ];
    known.into_iter().filter(|(flag, _)| permissions.contains(*flag)).map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_mmu::format::x86::{Caps, Long4};
    use plimsoll_mmu::{Format, Level};

    #[test]
    fn entries_read_as_people_say_them() {
        for (level, raw, text) in [
            (1, 0, "absent"),
            (1, 0x8000_0000_0000_0166, "absent, its other bits are the guest's own"),
            (4, 0x260_f067, "table at 0x260f000: user read, write, execute, accessed"),
            (
                2,
                0x8000_0000_0100_01e3,
                "page of 2M at 0x1000000: supervisor read, write, accessed, dirty, global",
            ),
            (1, 0xfee0_0000 | 0x1b | 1 << 63, "page of 4K at 0xfee00000: supervisor read, write, PAT 3"),
            (4, 0x81, "refused: reserved bits 0x80 are set"),
        ] {
            assert_eq!(words(&Long4::decode(raw, Level(level), &Caps::FULL)), text, "{raw:#x}");
        }
    }
}
