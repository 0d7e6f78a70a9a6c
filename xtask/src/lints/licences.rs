//! The rule `licences`: everything that is built in can be given away under the workspace's own terms.
//!
//! Enters: each package's SPDX expression. Leaves: those that no choice of permissive licences satisfies. The list is of
//! what is allowed, so that a licence nobody has looked at fails.
use super::Violation;
use crate::cargo::Metadata;

/// Licences without conditions on other code than their own.
const PERMISSIVE: [&str; 13] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Looks at every package that is built.
pub(super) fn check(metadata: &Metadata) -> Vec<Violation> {
    let mut violations = Vec::new();
    for package in &metadata.packages {
        let found = match &package.license {
            Some(license) if is_permissive(license) => continue,
            Some(license) => format!("\"{license}\" is not on the list of allowed licences"),
            None => "states no SPDX licence".to_owned(),
        };
        let place = format!("{} {}", package.name, package.version);
        violations.push(Violation { rule: "licences", place, found });
    }
    violations
}

/// True when the expression can be satisfied with licences of the list. What cannot be read is not.
fn is_permissive(expression: &str) -> bool {
    // `/` is how `OR` was written before SPDX.
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = &words[..];
    alternatives(&mut rest) == Some(true) && rest.is_empty()
}

/// `a OR b`: one suffices.
fn alternatives(rest: &mut &[&str]) -> Option<bool> {
    let mut satisfied = conditions(rest)?;
    while take(rest, "OR") {
        satisfied |= conditions(rest)?;
    }
    Some(satisfied)
}

/// `a AND b`: both are needed.
fn conditions(rest: &mut &[&str]) -> Option<bool> {
    let mut satisfied = licence(rest)?;
    while take(rest, "AND") {
        satisfied &= licence(rest)?;
    }
    Some(satisfied)
}

fn licence(rest: &mut &[&str]) -> Option<bool> {
    if take(rest, "(") {
        let satisfied = alternatives(rest)?;
        return take(rest, ")").then_some(satisfied);
    }
    let (name, after) = rest.split_first()?;
    *rest = after;
    if take(rest, "WITH") {
        let (exception, after) = rest.split_first()?;
        *rest = after;
        return Some(PERMISSIVE.contains(&&*format!("{name} WITH {exception}")));
    }
    Some(PERMISSIVE.contains(name))
}

fn take(rest: &mut &[&str], word: &str) -> bool {
    match rest.split_first() {
        Some((first, after)) if *first == word => {
            *rest = after;
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_permissive_alternative_suffices() {
        for good in ["MIT", "MIT OR Apache-2.0", "MIT/Apache-2.0", "GPL-2.0-only OR MIT", "Unlicense OR MIT"]
        {
            assert!(is_permissive(good), "{good}");
        }
        assert!(is_permissive("(MIT OR Apache-2.0) AND Unicode-3.0"));
        assert!(is_permissive("Apache-2.0 WITH LLVM-exception OR Apache-2.0 OR MIT"));
    }

    #[test]
    fn a_condition_that_is_not_permissive_fails_and_so_does_what_cannot_be_read() {
        for bad in
            ["GPL-3.0-only", "MIT AND MPL-2.0", "LGPL-2.1 OR GPL-2.0", "(MIT OR Apache-2.0) AND GPL-3.0"]
        {
            assert!(!is_permissive(bad), "{bad}");
        }
        for unreadable in ["", "MIT OR", "(MIT", "MIT Apache-2.0", "MIT WITH"] {
            assert!(!is_permissive(unreadable), "{unreadable}");
        }
    }
}
