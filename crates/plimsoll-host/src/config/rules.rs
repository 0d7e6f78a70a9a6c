//! Rules: what is said about machines before they are known by name.
//!
//! Enters: what can be seen of a VMM from outside. Leaves: the first rule that matches. Anybody who starts a VMM chooses its name and
//! command line; its user and control group are the kernel's word.
use super::{MachineConfig, Place};
use std::fmt;

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its place among the rules, from 1.
    pub number: usize,
    /// Where it stands.
    pub place: Place,
    /// Whom it is for.
    pub conditions: Conditions,
    /// What it says of them; nothing if they are to be left alone.
    pub config: Option<MachineConfig>,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule {} ({})", self.number, self.place)
    }
}

/// What has to hold, all of it. What is not there holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conditions {
    /// The kind of VMM.
    pub vmm: Option<String>,
    /// The machine's name.
    pub name: Option<Pattern>,
    /// Program and arguments.
    pub command_line: Option<Pattern>,
    /// A control group.
    pub cgroup: Option<Pattern>,
    /// The user, by name or number.
    pub user: Option<Pattern>,
}

/// What is seen of a VMM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traits {
    /// Its kind, as settings files call it.
    pub vmm: String,
    /// The machine's name.
    pub name: String,
    /// Program and arguments with a space between each.
    pub command_line: String,
    /// Its control groups.
    pub cgroups: Vec<String>,
    /// Its user by number and, where the host has one for that, by name.
    pub users: Vec<String>,
}

impl Conditions {
    /// Whether all of it holds.
    pub fn hold(&self, traits: &Traits) -> bool {
        let one = |pattern: &Option<Pattern>, text: &str| pattern.as_ref().is_none_or(|it| it.matches(text));
        let any = |pattern: &Option<Pattern>, texts: &[String]| {
            pattern.as_ref().is_none_or(|pattern| texts.iter().any(|text| pattern.matches(text)))
        };
        self.vmm.as_ref().is_none_or(|vmm| *vmm == traits.vmm)
            && one(&self.name, &traits.name)
            && one(&self.command_line, &traits.command_line)
            && any(&self.cgroup, &traits.cgroups)
            && any(&self.user, &traits.users)
    }
}

/// A text in which `*` stands for any text and `?` for any character.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(Vec<char>);

impl Pattern {
    /// Each text is one.
    pub fn new(text: &str) -> Self {
        Self(text.chars().collect())
    }

    /// Whether a whole text is as the pattern says, in time of at most the product of both lengths: the last `*` takes one character more
    /// wherever it fails, and those before it never need to.
    pub fn matches(&self, text: &str) -> bool {
        let (pattern, text) = (&self.0, text.chars().collect::<Vec<_>>());
        let (mut at, mut seen, mut star) = (0, 0, None);
        while let Some(letter) = text.get(seen) {
            match pattern.get(at) {
                Some('*') => {
                    star = Some((at, seen));
                    at += 1;
                }
                Some(own) if *own == '?' || own == letter => {
                    at += 1;
                    seen += 1;
                }
                _ => {
                    let Some((place, taken)) = star else { return false };
                    star = Some((place, taken + 1));
                    at = place + 1;
                    seen = taken + 1;
                }
            }
        }
        pattern.get(at..).unwrap_or_default().iter().all(|letter| *letter == '*')
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{prop_assert_eq, proptest};

    /// What a pattern means, said as plainly as can be.
    fn means(pattern: &[char], text: &[char]) -> bool {
        match (pattern, text) {
            ([], []) => true,
            (['*', rest @ ..], _) => means(rest, text) || (!text.is_empty() && means(pattern, &text[1..])),
            ([own, rest @ ..], [letter, others @ ..]) => {
                (*own == '?' || own == letter) && means(rest, others)
            }
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn a_pattern_matches_what_it_means(pattern in "[ab*?]{0,7}", text in "[ab]{0,9}") {
            let chars = |text: &str| text.chars().collect::<Vec<_>>();
            prop_assert_eq!(Pattern::new(&pattern).matches(&text), means(&chars(&pattern), &chars(&text)));
        }
    }

    #[test]
    fn a_hostile_command_line_costs_no_more_than_a_product() {
        let text = "a".repeat(100_000);
        assert!(!Pattern::new("*a*a*a*a*a*b").matches(&text));
    }

    #[test]
    fn all_conditions_have_to_hold_and_one_of_several_groups_is_enough() {
        let traits = Traits {
            vmm: "qemu".to_owned(),
            name: "web-1".to_owned(),
            command_line: "/usr/bin/qemu-system-x86_64 -name guest=web-1".to_owned(),
            cgroups: vec!["/".to_owned(), "/machine.slice/web-1.scope".to_owned()],
            users: vec!["64055".to_owned(), "libvirt-qemu".to_owned()],
        };
        let pattern = |text| Some(Pattern::new(text));
        let all = Conditions {
            vmm: Some("qemu".to_owned()),
            name: pattern("web-?"),
            command_line: pattern("*-name guest=*"),
            cgroup: pattern("/machine.slice/*"),
            user: pattern("libvirt-*"),
        };
        assert!(all.hold(&traits) && Conditions { user: pattern("64055"), ..all.clone() }.hold(&traits));
        for but in [
            Conditions { vmm: Some("crosvm".to_owned()), ..all.clone() },
            Conditions { name: pattern("web"), ..all.clone() },
            Conditions { command_line: pattern("-name*"), ..all.clone() },
            Conditions { cgroup: pattern("/system.slice/*"), ..all.clone() },
            Conditions { user: pattern("root"), ..all.clone() },
        ] {
            assert!(!but.hold(&traits), "{but:?}");
        }
    }
}
