//! Reading TOML values as what [`super::keys`] says they are; whatever is not becomes a problem with its place.

use std::{collections::HashMap, hash::Hash, time::Duration};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    choice::Choice,
    keys::{Key, Kind, Table},
    source::{Place, Source, quoted},
    value,
};

/// A TOML table that has been checked for unknown and missing keys.
#[derive(Clone, Copy)]
pub(super) struct Section<'a> {
    pub source: &'a Source<'a>,
    pub place: Place<'a>,
    /// Of its header.
    pub offset: usize,
    spec: &'static Table,
    /// `None`: not in the file, every key has its default.
    table: Option<&'a DeTable<'a>>,
}

/// One value of the file, or the default that stands for it.
#[derive(Clone, Copy)]
pub(super) struct Field<'a> {
    pub source: &'a Source<'a>,
    pub place: Place<'a>,
    pub offset: usize,
    key: &'static Key,
    /// The kind of `key`, or of the items of its list.
    kind: Kind,
    value: &'a DeValue<'a>,
}

impl<'a> Section<'a> {
    pub fn open(
        source: &'a Source<'a>,
        place: Place<'a>,
        offset: usize,
        spec: &'static Table,
        table: &'a DeTable<'a>,
    ) -> Self {
        let section = Self { source, place, offset, spec, table: Some(table) };
        for (key, _) in table.iter() {
            if spec.position(key.get_ref()).is_none() {
                let place = Place::Key { parent: &section.place, name: key.get_ref() };
                source.report(key.span().start, place.to_string(), unknown_key(key.get_ref(), spec));
            }
        }
        for key in spec.keys {
            if key.required && !table.contains_key(key.name) {
                section.reject_missing(key.name, &format!("{} is required", expected(key, key.kind)));
            }
        }
        section
    }

    /// The value of a key, if it is in the file.
    pub fn given(&self, name: &'static str) -> Option<Field<'_>> {
        let key = self.key(name)?;
        let value = self.table?.get(name)?;
        Some(self.field(key, value))
    }

    /// The value of a key, or its default if it is absent or not valid.
    pub fn value<'s, T>(&'s self, name: &'static str, read: impl Fn(&Field<'s>) -> Option<T>) -> Option<T> {
        self.value_or(name, None, read)
    }

    /// The value of a key; `base` if it is absent; its default if it is not valid, or absent and there is no `base`.
    pub fn value_or<'s, T>(
        &'s self,
        name: &'static str,
        base: Option<T>,
        read: impl Fn(&Field<'s>) -> Option<T>,
    ) -> Option<T> {
        let found = match self.given(name) {
            Some(field) => read(&field),
            None => base,
        };
        found.or_else(|| {
            let index = self.spec.position(name)?;
            let default = self.spec.default(index)?;
            read(&self.field(self.spec.keys.get(index)?, default))
        })
    }

    /// A table below this one; one where every key has its default when it is not in the file, or not a table.
    pub fn child(&self, name: &'static str) -> Option<Section<'_>> {
        let kind = self.key(name)?.kind;
        let given = self.given(name).and_then(|field| field.section());
        given.or_else(|| {
            Some(Section {
                source: self.source,
                place: self.place,
                offset: self.offset,
                spec: kind.table()?,
                table: None,
            })
        })
    }

    /// Reports a problem with a key, at its value if it has one, else at the header of the section.
    pub fn reject_key(&self, name: &str, message: String) {
        let at = self.table.and_then(|table| table.get(name)).map_or(self.offset, |value| value.span().start);
        self.source.report(at, Place::Key { parent: &self.place, name }.to_string(), message);
    }

    /// Reports that a key is missing and why it must not be. A text that is not TOML may have it after all.
    pub fn reject_missing(&self, name: &str, why: &str) {
        if !self.source.is_broken() {
            self.reject_key(name, format!("missing; {why}"));
        }
    }

    fn key(&self, name: &str) -> Option<&'static Key> {
        let key = self.spec.position(name).and_then(|index| self.spec.keys.get(index));
        debug_assert!(key.is_some(), "{name} is not in the table of keys");
        key
    }

    fn field<'s>(&'s self, key: &'static Key, value: &'s Spanned<DeValue<'s>>) -> Field<'s> {
        Field {
            source: self.source,
            place: Place::Key { parent: &self.place, name: key.name },
            offset: value.span().start,
            key,
            kind: key.kind,
            value: value.get_ref(),
        }
    }
}

impl<'a> Field<'a> {
    /// Reports a problem with this value.
    pub fn reject(&self, message: String) {
        self.source.report(self.offset, self.place.to_string(), message);
    }

    pub fn text(&self) -> Option<&'a str> {
        match self.value {
            DeValue::String(text) => Some(text),
            _ => self.wrong_type(),
        }
    }

    /// A string that `parse` understands; its error is the message of the problem.
    pub fn parse<T>(&self, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        parse(self.text()?).map_err(|message| self.reject(message)).ok()
    }

    /// The value in the range of its kind; a string or an integer, as written.
    pub fn text_or_integer(&self) -> Option<String> {
        match self.value {
            DeValue::String(text) => Some(text.to_string()),
            DeValue::Integer(integer) => Some(integer.to_string()),
            _ => self.wrong_type(),
        }
    }

    pub fn boolean(&self) -> Option<bool> {
        match self.value {
            DeValue::Boolean(value) => Some(*value),
            _ => self.wrong_type(),
        }
    }

    /// An integer in the range of its [`Kind::Integer`].
    pub fn integer(&self) -> Option<u32> {
        let DeValue::Integer(integer) = self.value else {
            return self.wrong_type();
        };
        let (min, max) = match self.kind {
            Kind::Integer { min, max } => (min, max),
            _ => (0, u64::from(u32::MAX)),
        };
        let value =
            u64::from_str_radix(integer.as_str(), integer.radix()).ok().filter(|value| (min..=max).contains(value));
        if value.is_none() {
            self.reject(format!("{integer} is out of range ({min}–{max})"));
        }
        value.and_then(|value| u32::try_from(value).ok())
    }

    /// A duration in the range of its [`Kind::Duration`]; `Some(None)` is `"never"`.
    pub fn duration_or_never(&self) -> Option<Option<Duration>> {
        let Kind::Duration { min, max, never } = self.kind else {
            return self.wrong_type();
        };
        match self.value {
            DeValue::String(text) if never && text == "never" => Some(None),
            DeValue::String(text) if text == "never" => {
                self.reject("\"never\" is not allowed here; a duration such as \"30s\" is expected".to_owned());
                None
            }
            DeValue::String(text) => self.parse_duration(text, min, max, never).map(Some),
            DeValue::Integer(number) => {
                self.reject(format!("{number} has no unit; write \"{number}s\" for seconds ({})", value::UNITS));
                None
            }
            _ => self.wrong_type(),
        }
    }

    /// A duration in the range of its [`Kind::Duration`].
    pub fn duration(&self) -> Option<Duration> {
        self.duration_or_never().flatten()
    }

    fn parse_duration(&self, text: &str, min: Duration, max: Duration, never: bool) -> Option<Duration> {
        let range = || {
            let never = if never { ", or \"never\"" } else { "" };
            format!("{}–{}{never}", value::show_duration(min), value::show_duration(max))
        };
        let parsed = value::duration(text).and_then(|duration| match duration {
            _ if (min..=max).contains(&duration) => Ok(duration),
            _ => Err(format!("{} is out of range ({})", quoted(text), range())),
        });
        parsed.map_err(|message| self.reject(message)).ok()
    }

    pub fn choice<T: Choice>(&self) -> Option<T> {
        let text = self.text()?;
        let value = T::from_name(text);
        if value.is_none() {
            let names: Vec<String> = T::NAMES.iter().map(|name| quoted(name)).collect();
            let hint = nearest(text, T::NAMES.iter().copied()).map(|name| format!("; did you mean {name:?}?"));
            let hint = hint.unwrap_or_default();
            self.reject(format!("{} is not one of {}{hint}", quoted(text), names.join(", ")));
        }
        value
    }

    /// A file, as seen from the folder of the configuration.
    pub fn file(&self) -> Option<std::path::PathBuf> {
        self.parse(value::path).map(|path| self.source.resolve(&path))
    }

    /// A table below.
    pub fn section(&self) -> Option<Section<'a>> {
        match (self.value, self.kind.table()) {
            (DeValue::Table(table), Some(spec)) => {
                let place = match self.place {
                    Place::Index { parent: Place::Key { parent: Place::Root, name: "route" }, index } => {
                        Place::Route { name: table.get("name").and_then(|name| name.get_ref().as_str()), index }
                    }
                    place => place,
                };
                Some(Section::open(self.source, place, self.offset, spec, table))
            }
            _ => self.wrong_type(),
        }
    }

    pub fn is_text(&self, text: &str) -> bool {
        self.value.as_str() == Some(text)
    }

    pub fn is_string(&self) -> bool {
        self.value.is_str()
    }

    pub fn is_table(&self) -> bool {
        self.value.is_table()
    }

    /// The items of an array; those that `read` rejects are left out.
    pub fn list<T>(&self, mut read: impl FnMut(&Field<'_>) -> Option<T>) -> Option<Vec<T>> {
        let DeValue::Array(array) = self.value else {
            return self.wrong_type();
        };
        let kind = match self.kind {
            Kind::List(kind) => *kind,
            kind => kind,
        };
        let mut items = Vec::with_capacity(array.len());
        for (index, item) in array.iter().enumerate() {
            let place = Place::Index { parent: &self.place, index };
            let field = Field { place, offset: item.span().start, kind, value: item.get_ref(), ..*self };
            items.extend(read(&field));
        }
        Some(items)
    }

    /// The items of an array in which nothing may be twice, by what `identity` takes of each.
    pub fn unique_list<T, I: Hash + Eq>(
        &self,
        mut read: impl FnMut(&Field<'_>) -> Option<T>,
        identity: impl Fn(&T) -> I,
    ) -> Option<Vec<T>> {
        let mut index = 0;
        let mut seen = HashMap::new();
        self.list(|field| {
            let here = index;
            index += 1;
            let item = read(field)?;
            if let Some(first) = seen.insert(identity(&item), here) {
                field.reject(format!(
                    "{} is in this list already, at [{first}]; nothing may be in it twice",
                    field.shown()
                ));
            }
            Some(item)
        })
    }

    pub fn is_empty_list(&self) -> bool {
        self.value.as_array().is_some_and(|array| array.is_empty())
    }

    /// The value as written; for a backend's table, its address.
    fn shown(&self) -> String {
        match self.value {
            DeValue::Table(table) => match table.get("address").map(Spanned::get_ref) {
                Some(DeValue::String(address)) => quoted(address),
                _ => "this table".to_owned(),
            },
            value => show(value),
        }
    }

    fn wrong_type<T>(&self) -> Option<T> {
        let kind = match self.value {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "an integer",
            DeValue::Float(_) => "a decimal number",
            DeValue::Boolean(_) => "a boolean",
            DeValue::Datetime(_) => "a date or time",
            DeValue::Array(_) => "an array",
            DeValue::Table(_) => "a table",
        };
        self.reject(format!("{} is {kind}; {} is expected", show(self.value), expected(self.key, self.kind)));
        None
    }
}

fn show(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => quoted(text),
        DeValue::Integer(integer) => integer.to_string(),
        DeValue::Float(float) => float.to_string(),
        DeValue::Boolean(boolean) => boolean.to_string(),
        DeValue::Datetime(datetime) => datetime.to_string(),
        DeValue::Array(_) | DeValue::Table(_) => "this".to_owned(),
    }
}

/// What a value of `kind` must be, as the end of a sentence.
fn expected(key: &Key, kind: Kind) -> String {
    match kind {
        Kind::Bool => "true or false".to_owned(),
        Kind::Integer { min, max } => format!("an integer from {min} to {max}"),
        Kind::Duration { never: false, .. } => "a duration such as \"30s\"".to_owned(),
        Kind::Duration { never: true, .. } => "a duration such as \"30s\", or \"never\",".to_owned(),
        Kind::Choice(names) => {
            let names: Vec<String> = names.iter().map(|name| quoted(name)).collect();
            format!("one of {}", names.join(", "))
        }
        Kind::Rate => "a rate such as \"300/minute\"".to_owned(),
        Kind::AdminListen => "an address and port such as \"127.0.0.1:9900\", or \"off\",".to_owned(),
        Kind::LogFilter => "a level such as \"info\"".to_owned(),
        Kind::MarkMask => "a mask such as \"0xffffff00\"".to_owned(),
        Kind::RouteName => "a name of 1 to 63 of a–z, 0–9 and -".to_owned(),
        Kind::Listen => "an address and port such as \"0.0.0.0:443\"".to_owned(),
        Kind::Backend | Kind::Target => "an address such as \"10.0.0.2:8080\"".to_owned(),
        Kind::Network => "a network such as \"10.0.0.0/8\"".to_owned(),
        Kind::Sni => "a server name such as \"www.example.com\"".to_owned(),
        Kind::Alpn => "a protocol name such as \"h2\"".to_owned(),
        Kind::ServerName => "a host name".to_owned(),
        Kind::File => "a file name".to_owned(),
        Kind::Directory => format!("an address such as {}", key.example),
        Kind::Contact => "a mail address such as \"mailto:admin@example.com\"".to_owned(),
        Kind::KeyId => "the name that the CA gave the key".to_owned(),
        Kind::Secret => "the key that the CA gave, in base64url".to_owned(),
        Kind::List(_) => format!("an array such as {}", key.example),
        Kind::Tables(_) if key.name == "route" => "[[route]], in double brackets,".to_owned(),
        Kind::Certificates => format!("an array such as {}, or \"acme\",", key.example),
        Kind::Table(_) | Kind::Tables(_) => format!(
            "{} {}",
            if matches!(kind, Kind::Table(_)) { "a table such as" } else { "an array such as" },
            key.example
        ),
    }
}

fn unknown_key(name: &str, spec: &Table) -> String {
    if let Some(near) = nearest(name, spec.keys.iter().map(|key| key.name)) {
        return format!("unknown key; did you mean {near:?}?");
    }
    let below: Vec<String> = spec
        .keys
        .iter()
        .filter(|key| key.kind.table().is_some_and(|table| table.position(name).is_some()))
        .map(|key| format!("\"{}.{name}\"", key.name))
        .collect();
    if !below.is_empty() {
        return format!("unknown key; did you mean {}?", below.join(" or "));
    }
    let known: Vec<&str> = spec.keys.iter().map(|key| key.name).collect();
    format!("unknown key; known here: {}", known.join(", "))
}

/// The word that `text` was probably meant to be.
pub(super) fn nearest<'w>(text: &str, words: impl Iterator<Item = &'w str>) -> Option<&'w str> {
    // Longer than any word by more than a slip of the pen.
    if text.len() > 40 {
        return None;
    }
    let text = text.to_ascii_lowercase().replace('_', "-");
    words
        .map(|word| (strsim::osa_distance(&text, &word.replace('_', "-")), word))
        .filter(|(distance, word)| *distance <= (word.len() / 3).clamp(1, 3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, word)| word)
}
