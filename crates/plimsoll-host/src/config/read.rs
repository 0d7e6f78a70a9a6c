//! Settings files by their tables: text enters, values with their places leave, and every mistake that a value can be by itself.
//!
//! What must never happen: a key that is read past, or a value taken for another kind's. A section with a mistake is still returned, so
//! that the rest of the file can be judged; whoever has mistakes takes over nothing.
use super::keys::Section;
use super::{ConfigError, Pattern, Wrong};
use plimsoll_policy::Ppm;
use plimsoll_types::ByteCount;
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// What may be said for a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A size.
    Size,
    /// A part of something.
    Part,
    /// A whole number.
    Count,
    /// Yes or no.
    Flag,
    /// A name.
    Text,
    /// A pattern of `*` and `?`.
    Pattern,
    /// Some of them.
    Patterns,
    /// An address of this host and a port.
    Address,
    /// A path from the root.
    Socket,
    /// A path from the folder of the settings.
    File,
    /// One of these words.
    OneOf(&'static [&'static str]),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size => f.write_str("a size in quotes, such as \"512M\" (K, M, G, T: powers of 1024)"),
            Self::Part => f.write_str("a percentage in quotes, such as \"20%\" or \"0.1%\""),
            Self::Count => write!(f, "a whole number from 0 to {}", u32::MAX),
            Self::Flag => f.write_str("true or false"),
            Self::Text => f.write_str("a name in quotes"),
            Self::Pattern => f.write_str("a pattern in quotes, in which * is any text and ? any character"),
            Self::Patterns => f.write_str("a list of patterns, such as [\"ops.example.org\", \"*.test\"]"),
            Self::Address => {
                f.write_str("an address and a port in quotes, such as \"192.0.2.1:9753\" or \"[::]:9753\"")
            }
            Self::Socket => f.write_str("a path from / in quotes"),
            Self::File => f.write_str("a path in quotes"),
            Self::OneOf(words) => write!(f, "one of {}", quoted(words)),
        }
    }
}

fn quoted(words: &[&str]) -> String {
    words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(", ")
}

/// What was said for a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Size(ByteCount),
    Part(Ppm),
    Count(u32),
    Flag(bool),
    Text(String),
    Address(SocketAddr),
    Texts(Vec<String>),
}

/// A file and a line in it, from 1.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The file.
    pub path: String,
    /// The line.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.path, self.line)
    }
}

/// What a section says.
#[derive(Clone, Debug)]
pub(super) struct Said {
    /// Where it begins.
    pub(super) place: Place,
    values: BTreeMap<&'static str, (Value, Place)>,
}

impl Said {
    /// Where a key is, or else where the section begins.
    pub(super) fn place_of(&self, key: &str) -> &Place {
        self.values.get(key).map_or(&self.place, |(_, place)| place)
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.values.get(key).map(|(value, _)| value)
    }

    pub(super) fn size(&self, key: &str) -> Option<ByteCount> {
        self.value(key).and_then(|value| if let Value::Size(size) = value { Some(*size) } else { None })
    }

    pub(super) fn part(&self, key: &str) -> Option<Ppm> {
        self.value(key).and_then(|value| if let Value::Part(part) = value { Some(*part) } else { None })
    }

    pub(super) fn count(&self, key: &str) -> Option<u32> {
        self.value(key).and_then(|value| if let Value::Count(count) = value { Some(*count) } else { None })
    }

    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        self.value(key).and_then(|value| if let Value::Flag(flag) = value { Some(*flag) } else { None })
    }

    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.value(key).and_then(|value| if let Value::Text(text) = value { Some(&**text) } else { None })
    }

    pub(super) fn address(&self, key: &str) -> Option<SocketAddr> {
        self.value(key).and_then(|value| if let Value::Address(it) = value { Some(*it) } else { None })
    }

    pub(super) fn patterns(&self, key: &str) -> Vec<Pattern> {
        let Some(Value::Texts(texts)) = self.value(key) else { return Vec::new() };
        texts.iter().map(|text| Pattern::new(text)).collect()
    }

    pub(super) fn path(&self, key: &str) -> Option<PathBuf> {
        self.text(key).map(PathBuf::from)
    }
}

/// A file, and the mistakes found in it.
pub(super) struct Source<'a> {
    pub(super) path: &'a str,
    pub(super) text: &'a str,
    pub(super) mistakes: &'a mut Vec<ConfigError>,
}

type Table<'t> = DeTable<'t>;
type Entry<'t> = (Spanned<std::borrow::Cow<'t, str>>, Spanned<DeValue<'t>>);

impl<'a> Source<'a> {
    /// Its outermost table; none where it is no TOML.
    pub(super) fn table(&mut self) -> Option<Table<'a>> {
        let (table, errors) = DeTable::parse_recoverable(self.text);
        let mut last = 0;
        for error in &errors {
            let place = self.place(error.span().map_or(0, |span| span.start));
            // What follows on the same line follows from it.
            if place.line != last {
                last = place.line;
                let message = error.message().lines().next().unwrap_or_default().to_owned();
                self.wrong(place, Wrong::Syntax(message));
            }
        }
        errors.is_empty().then(|| table.into_inner())
    }

    pub(super) fn place(&self, byte: usize) -> Place {
        let line = 1 + self.text.bytes().take(byte).filter(|byte| *byte == b'\n').count();
        Place { path: self.path.to_owned(), line }
    }

    pub(super) fn wrong(&mut self, place: Place, wrong: Wrong) {
        self.mistakes.push(ConfigError::Wrong { place, wrong });
    }

    /// The entries of a value that is to be a table, in the order of the file.
    pub(super) fn tables(&mut self, name: &str, value: Spanned<DeValue<'a>>) -> Vec<Entry<'a>> {
        let at = value.span().start;
        let DeValue::Table(table) = value.into_inner() else {
            let text = format!("{name} is no table: write it as [{name}.NAME]");
            self.wrong(self.place(at), Wrong::Syntax(text));
            return Vec::new();
        };
        let mut entries: Vec<_> = table.into_iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        entries
    }

    /// What a table says by the keys of a section.
    pub(super) fn section(&mut self, section: &Section, place: Place, value: DeValue<'a>) -> Said {
        let mut said = Said { place, values: BTreeMap::new() };
        let DeValue::Table(table) = value else {
            let (place, found) = (said.place.clone(), shown(&value));
            let text = format!("{found} is no table: write it as {}", section.heading);
            self.wrong(place, Wrong::Syntax(text));
            return said;
        };
        for (name, value) in table {
            let place = self.place(name.span().start);
            let Some(key) = section.keys().find(|key| key.name == *name.get_ref()) else {
                let known =
                    section.keys().map(|key| format!("`{}`", key.name)).collect::<Vec<_>>().join(", ");
                let text = format!("unknown key `{}`: use one of {known}", name.get_ref());
                self.wrong(place, Wrong::Syntax(text));
                continue;
            };
            match understood(key.kind, value.get_ref()) {
                Ok(value) => drop(said.values.insert(key.name, (value, place))),
                Err(why) => self.wrong(place, Wrong::Syntax(format!("{} = {why}", key.name))),
            }
        }
        said
    }
}

/// A value as its kind, or what is wrong with it.
fn understood(kind: Kind, value: &DeValue<'_>) -> Result<Value, String> {
    let other = || format!("{}: write {kind}", shown(value));
    match (kind, value) {
        (Kind::Flag, DeValue::Boolean(flag)) => Ok(Value::Flag(*flag)),
        (Kind::Count, DeValue::Integer(number)) => {
            let number = u32::from_str_radix(number.as_str(), number.radix());
            number.map(Value::Count).map_err(|_| other())
        }
        (Kind::Patterns, DeValue::Array(list)) if !list.is_empty() => {
            let text = |one: &Spanned<DeValue<'_>>| match one.get_ref() {
                DeValue::String(text) if !text.is_empty() => Some(text.clone().into_owned()),
                _ => None,
            };
            list.iter().map(text).collect::<Option<_>>().map(Value::Texts).ok_or_else(other)
        }
        (Kind::Flag | Kind::Count | Kind::Patterns, _) => Err(other()),
        (kind, DeValue::String(text)) => {
            let why = |error: &dyn fmt::Display| format!("{text:?}: {error}");
            match kind {
                Kind::Size => {
                    text.parse().map(Value::Size).map_err(|error: <ByteCount as FromStr>::Err| why(&error))
                }
                Kind::Part => text.parse().map(|part: Part| Value::Part(part.0)).map_err(|error| why(&error)),
                Kind::Address => text.parse().map(Value::Address).map_err(|_| other()),
                Kind::OneOf(words) if !words.contains(&&**text) => Err(other()),
                Kind::Socket if !text.starts_with('/') => Err(other()),
                _ if text.is_empty() => Err(why(&"it is empty: leave the line out, or say something")),
                _ => Ok(Value::Text(text.clone().into_owned())),
            }
        }
        _ => Err(other()),
    }
}

/// A value as it is written.
fn shown(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("{text:?}"),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(flag) => flag.to_string(),
        DeValue::Datetime(time) => time.to_string(),
        DeValue::Array(_) => "a list".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    }
}

/// A part of something, as people write it: a percentage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part(Ppm);

impl Part {
    /// In millionths.
    pub const fn ppm(self) -> Ppm {
        self.0
    }
}

impl FromStr for Part {
    type Err = &'static str;

    /// `75 %`, `0.1%`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WHAT: &str = "not a percentage: write it as \"20%\" or \"0.1%\"";
        let number = text.trim().strip_suffix('%').ok_or(WHAT)?.trim_end();
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty() || fraction.len() > 4 || !is_number(whole) || !is_number(fraction) {
            return Err(WHAT);
        }
        let whole: u32 = whole.parse().map_err(|_| WHAT)?;
        let fraction: u32 = format!("{fraction:0<4}").parse().map_err(|_| WHAT)?;
        let ppm = whole.checked_mul(10_000).and_then(|whole| whole.checked_add(fraction)).ok_or(WHAT)?;
        Ok(Self(Ppm(ppm)))
    }
}
