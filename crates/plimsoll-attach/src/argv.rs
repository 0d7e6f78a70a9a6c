//! Command lines: arguments enter, options with their values and properties leave. Nothing here knows a VMM, and nothing
//! here fails: what does not look like an option or a property is not one.

use plimsoll_types::ByteCount;
use serde_json::Value;

/// One option: its name without dashes, and the arguments up to the next option.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Opt<'a> {
    pub(crate) name: &'a str,
    pub(crate) values: Vec<&'a str>,
}

/// A command line cut into options. `--name=value` counts as `--name value`.
pub(crate) struct Options<'a>(Vec<Opt<'a>>);

impl<'a> Options<'a> {
    /// Cuts the arguments after the program's name.
    pub(crate) fn new(argv: &'a [String]) -> Self {
        let mut options: Vec<Opt<'a>> = Vec::new();
        for argument in argv.iter().skip(1) {
            let Some(name) = argument.strip_prefix('-').filter(|rest| !rest.is_empty()) else {
                if let Some(last) = options.last_mut() {
                    last.values.push(argument);
                }
                continue;
            };
            let long = name.strip_prefix('-');
            let option = match long.and_then(|long| long.split_once('=')) {
                Some((name, value)) => Opt { name, values: vec![value] },
                None => Opt { name: long.unwrap_or(name), values: Vec::new() },
            };
            options.push(option);
        }
        Self(options)
    }

    /// The value of each option of one of those names, in order. What follows a value is a word without an option.
    pub(crate) fn all<'s>(&'s self, names: &'s [&str]) -> impl Iterator<Item = &'a str> + 's {
        self.named(names).filter_map(|option| option.values.first().copied())
    }

    /// All values of the options of one of those names, for programs that take several after one name.
    pub(crate) fn lists<'s>(&'s self, names: &'s [&str]) -> impl Iterator<Item = &'a str> + 's {
        self.named(names).flat_map(|option| option.values.iter().copied())
    }

    fn named<'s>(&'s self, names: &'s [&str]) -> impl Iterator<Item = &'s Opt<'a>> + 's {
        self.0.iter().filter(|option| names.contains(&option.name))
    }

    /// The value that counts: the last one.
    pub(crate) fn last(&self, names: &[&str]) -> Option<&'a str> {
        self.all(names).last()
    }

    /// True when the option is there, with a value or without.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|option| option.name == name)
    }

    /// The properties of each value of the options of one of those names.
    pub(crate) fn properties<'s>(&'s self, names: &'s [&str]) -> impl Iterator<Item = Properties> + 's {
        self.all(names).map(Properties::new)
    }
}

/// `first,key=value,flag`, a comma inside a value written twice; or the same as a JSON object.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Properties {
    /// What stands before the first comma when it has no key.
    first: Option<String>,
    pairs: Vec<(String, String)>,
}

impl Properties {
    pub(crate) fn new(text: &str) -> Self {
        if text.starts_with('{') {
            return Self::from_json(text);
        }
        let mut properties = Self::default();
        for (place, item) in items(text).into_iter().enumerate() {
            match item.split_once('=') {
                Some((key, value)) => properties.pairs.push((key.to_owned(), value.to_owned())),
                None if place == 0 => properties.first = Some(item),
                None => properties.pairs.push((item, "on".to_owned())),
            }
        }
        properties
    }

    /// Scalars as they are written in the other form, the first element of a list; what is nested deeper is left out.
    fn from_json(text: &str) -> Self {
        let object = serde_json::from_str(text).ok();
        let object = object.and_then(|value: Value| value.as_object().cloned()).unwrap_or_default();
        let pairs = object.into_iter().filter_map(|(key, value)| Some((key, scalar(&value)?))).collect();
        Self { first: None, pairs }
    }

    /// The last value of the key.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// The value of the key, which may also stand first without it.
    pub(crate) fn first_or(&self, key: &str) -> Option<&str> {
        self.get(key).or(self.first.as_deref())
    }

    /// True when the key is set to on, yes or true.
    pub(crate) fn is_on(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| matches!(value, "on" | "yes" | "true" | "y"))
    }

    /// The size under the key; a bare number counts `unit`s.
    pub(crate) fn size(&self, key: &str, unit: ByteCount) -> Option<ByteCount> {
        size(self.get(key)?, unit)
    }
}

/// A size, whose bare number counts `unit`s.
pub(crate) fn size(text: &str, unit: ByteCount) -> Option<ByteCount> {
    match text.parse::<u64>() {
        Ok(count) => count.checked_mul(unit.0).map(ByteCount),
        Err(_) => text.parse().ok(),
    }
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(true) => Some("on".to_owned()),
        Value::Bool(false) => Some("off".to_owned()),
        Value::Array(list) => list.first().and_then(scalar),
        Value::Null | Value::Object(_) => None,
    }
}

/// Cuts at single commas; two commas are one that belongs to the value.
fn items(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        let is_separator = letter == ',' && letters.next_if_eq(&',').is_none();
        match items.last_mut() {
            Some(last) if !is_separator => last.push(letter),
            _ => items.push(String::new()),
        }
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, proptest};

    #[test]
    fn a_comma_written_twice_belongs_to_the_value() {
        let properties = Properties::new("web,,1,debug-threads=on,process=a,,b=c");
        assert_eq!(properties.first_or("guest"), Some("web,1"));
        assert_eq!(properties.get("process"), Some("a,b=c"));
        assert!(properties.is_on("debug-threads"));
    }

    #[test]
    fn json_says_the_same_as_text() {
        let json =
            Properties::new(r#"{"qom-type":"x","size":4096,"share":true,"host-nodes":[1,2],"deep":{"a":1}}"#);
        assert_eq!(json.size("size", ByteCount(1)), Some(ByteCount(4096)));
        assert!(json.is_on("share"));
        assert_eq!((json.get("host-nodes"), json.get("deep")), (Some("1"), None));
        assert_eq!(Properties::new("{broken"), Properties::default());
    }

    #[test]
    fn bare_numbers_count_units() {
        assert_eq!(size("512", ByteCount::mib(1)), Some(ByteCount::mib(512)));
        assert_eq!(size("2097152k", ByteCount::mib(1)), Some(ByteCount(2 << 30)));
        assert_eq!(size("18446744073709551615", ByteCount::mib(1)), None);
        assert_eq!(size("much", ByteCount(1)), None);
    }

    #[test]
    fn options_have_values_in_both_forms() {
        let argv = ["ch", "--zone", "a=1", "b=2", "--id=x=y", "-m", "5", "-flag"].map(str::to_owned);
        let options = Options::new(&argv);
        assert_eq!(options.lists(&["zone"]).collect::<Vec<_>>(), ["a=1", "b=2"]);
        assert_eq!(options.all(&["zone"]).collect::<Vec<_>>(), ["a=1"]);
        assert_eq!((options.last(&["id"]), options.last(&["mem", "m"])), (Some("x=y"), Some("5")));
        assert!(options.has("flag") && !options.has("x"));
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(argv in any::<Vec<String>>(), text in any::<String>()) {
            let options = Options::new(&argv);
            options.properties(&["m"]).for_each(drop);
            let _ = (Properties::new(&text), size(&text, ByteCount::mib(1)));
        }
    }
}
