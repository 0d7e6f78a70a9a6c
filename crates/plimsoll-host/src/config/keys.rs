//! Every key of a settings file: its kind, what it is unless it is said, and what it means.
//!
//! Enters: nothing. Leaves: the tables by which files are read (`read`) and described ([`reference()`]). What must never happen: a key
//! that is understood and not described, or the other way round; so there is no other list of them.
use super::read::Kind;
use Kind::{Address, Count, File, Flag, OneOf, Part, Pattern, Patterns, Size, Socket, Text};
use plimsoll_policy::Rung;
use std::fmt::Write;

/// A key.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// What it is called.
    pub name: &'static str,
    /// What may be said.
    pub kind: Kind,
    /// What it is where it is left out.
    pub usual: &'static str,
    /// What it means.
    pub meaning: &'static str,
}

/// The keys of one kind of table.
#[derive(Clone, Copy, Debug)]
pub struct Section {
    /// How it is headed.
    pub heading: &'static str,
    /// What it is about.
    pub meaning: &'static str,
    /// Its keys.
    pub keys: &'static [&'static [Key]],
}

impl Section {
    /// All its keys.
    pub fn keys(&self) -> impl Iterator<Item = &'static Key> + use<> {
        self.keys.iter().copied().flatten()
    }
}

const fn key(name: &'static str, kind: Kind, usual: &'static str, meaning: &'static str) -> Key {
    Key { name, kind, usual, meaning }
}

/// `[host]`.
pub const HOST: Section = Section {
    heading: "[host]",
    meaning: "the memory that machines share",
    keys: &[&[
        key(
            "memory",
            Size,
            "all the host has",
            "what machines share, to `plimsoll manage`; a daemon has a budget",
        ),
        key("reserve", Size, "0", "of it, for what is no machine; likewise"),
        key(
            "budget",
            Size,
            "what --budget says",
            "what a daemon's machines, their VMMs and the daemon may use; --budget comes before it",
        ),
        key("idle-tax", Part, "75%", "how much dearer idle memory is than used: 75 % is four times"),
        key(
            "storing-share",
            Part,
            "100%",
            "of one processor, what a daemon's pagers take at most for storing pages ahead of demand; 200% is two: docs/daemon.md",
        ),
        key(
            "costs",
            File,
            "what we measured",
            "a file of what taking memory costs here, seen from this one's folder: docs/costs.md",
        ),
    ]],
};

const SHARES: Key = key("shares", Count, "5000", "its weight against its siblings, 1 to 1000000");

/// `[group.NAME]`.
pub const GROUP: Section = Section {
    heading: "[group.NAME], or groups.d/NAME.toml",
    meaning: "machines that share guarantees and limits",
    keys: &[&[
        key("group", Text, "the host's own", "the group it is nested in"),
        key("reservation", Size, "what its machines keep each", "what its machines keep together"),
        key("limit", Size, "none", "what its machines never exceed together"),
        SHARES,
        key("sharing", Flag, "false", "its machines are one sharing domain: equal pages may be kept once"),
    ]],
};

/// What `highest` may be: of each word for the dearest means, the policy's.
pub(super) const MEANS: [(&str, Rung); 6] = [
    ("guest-free", Rung::GuestFree),
    ("balloon", Rung::Balloon),
    ("sharing", Rung::Sharing),
    ("never-page", Rung::NEVER_PAGE),
    ("compress", Rung::Compress),
    ("disk", Rung::Disk),
];
const MEANS_WORDS: &[&str] = &{
    let [one, two, three, four, five, six] = MEANS;
    [one.0, two.0, three.0, four.0, five.0, six.0]
};

/// What is said of machines one by one and by rules.
const SETTINGS: &[Key] = &[
    key("group", Text, "the host's own", "the group it belongs to"),
    key(
        "kind",
        OneOf(&["static", "dedicated"]),
        "neither",
        "all of its memory, always; dedicated is never touched, either",
    ),
    key("reservation", Size, "0", "what it keeps whatever the others want"),
    key("limit", Size, "its size", "what it never exceeds"),
    SHARES,
    key("startup", Size, "the minimum", "Hyper-V's words: what it is to have until it has started"),
    key("minimum", Size, "none", "Hyper-V's words: what it keeps; needs a maximum"),
    key("maximum", Size, "none", "Hyper-V's words: what it never exceeds; needs a minimum"),
    key("buffer", Part, "20%", "Hyper-V's words: what it is to have beyond what it uses, at most 2000%"),
    key("weight", Count, "5000", "Hyper-V's words: its weight, at most 10000"),
    key(
        "highest",
        OneOf(MEANS_WORDS),
        "disk",
        "the dearest means by which memory may be taken from it; never-page is sharing",
    ),
    key("stall-objective", Part, "0.1%", "how much of the time its processors may wait for memory"),
];

/// `[machine.NAME]`.
pub const MACHINE: Section = Section {
    heading: "[machine.NAME], or machines.d/NAME.toml",
    meaning: "a machine, by its name or UUID; it is managed when it comes",
    keys: &[
        SETTINGS,
        &[
            key("size", Size, "what the machine shows", "the RAM its guest owns"),
            key("qmp", Socket, "none", "a QMP monitor that nobody else uses, for its balloon"),
            key(
                "api",
                Socket,
                "what its command line says",
                "the API socket of a Cloud Hypervisor or Firecracker",
            ),
        ],
    ],
};

/// What whoever may ask may do, in words.
pub(super) const ROLES: [&str; 2] = ["read", "change"];

/// `[api]`.
pub const API: Section = Section {
    heading: "[api]",
    meaning: "who may use a daemon's API beside root and the user that runs it: docs/remote.md",
    keys: &[&[
        key("group", Text, "none", "a group of this host's users that may use the socket, by name or number"),
        key("group-may", OneOf(&ROLES), "read", "what it may do there: read, or change as well"),
        key(
            "listen",
            Address,
            "none",
            "where the API is served over TLS; needs certificate, key, client-ca, and may-change or may-read",
        ),
        key("certificate", File, "none", "the daemon's own certificate, and whatever signed it, as PEM"),
        key(
            "key",
            File,
            "none",
            "the certificate's key, as PEM: root's or the daemon's own, and closed to others",
        ),
        key("client-ca", File, "none", "who signs clients' certificates, as PEM; others are not heard"),
        key(
            "may-change",
            Patterns,
            "none",
            "of those clients, the ones that may change things, by names of their certificates",
        ),
        key(
            "may-read",
            Patterns,
            "none",
            "of those clients, the ones that may read, by names of their certificates",
        ),
    ]],
};

/// What `vmm` may be.
const VMMS: &[&str] = &["qemu", "cloud-hypervisor", "firecracker", "crosvm", "plimsoll"];

/// `[[rule]]`.
pub const RULE: Section = Section {
    heading: "[[rule]]",
    meaning: "machines as they appear, if no table is theirs: the first rule of which all conditions hold, in the order of the file",
    keys: &[
        &[
            key("vmm", OneOf(VMMS), "any", "condition: the kind of VMM"),
            key("name", Pattern, "any", "condition: the machine's name"),
            key(
                "command-line",
                Pattern,
                "any",
                "condition: the VMM's program and arguments, with a space between each",
            ),
            key("cgroup", Pattern, "any", "condition: the path of a control group that the VMM is in"),
            key("user", Pattern, "any", "condition: the VMM's user, by name or number"),
            key(
                "attach",
                Flag,
                "true",
                "false: machines that match are left alone; there are no settings then",
            ),
        ],
        SETTINGS,
    ],
};

/// All of them, in the order in which they are described.
pub const SECTIONS: [Section; 5] = [HOST, GROUP, MACHINE, RULE, API];

/// Every key with its meaning, as a page of Markdown.
pub fn reference() -> String {
    let mut page = String::new();
    for section in SECTIONS {
        let _ = writeln!(page, "## `{}`\n\n{}.\n", section.heading, capital(section.meaning));
        page.push_str("| key | what may be said | left out | meaning |\n|---|---|---|---|\n");
        for Key { name, kind, usual, meaning } in section.keys() {
            let _ = writeln!(page, "| `{name}` | {kind} | {usual} | {meaning} |");
        }
        page.push('\n');
    }
    page
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
