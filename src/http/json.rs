//! JSON: strict where it is read, and complete where it is written. The limits are those of serde_json (depth 128), and no
//! member may appear twice: a proxy may check the first of two while a parser uses the last.

use std::fmt;

use prost_reflect::{DynamicMessage, SerializeOptions};
use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value, map::Entry};

/// Parses a document.
pub fn parse(bytes: &[u8]) -> Result<Value, serde_json::Error> {
    serde_json::from_slice::<Strict>(bytes).map(|strict| strict.0)
}

/// A message as proto3 JSON, with every field that is always there, also if it is false, zero or empty. A message that is
/// not set is left out, and so is a member of a `oneof`.
pub fn of_message(message: &DynamicMessage) -> Result<Value, serde_json::Error> {
    let options = SerializeOptions::new().skip_default_fields(false);
    message.serialize_with_options(serde_json::value::Serializer, &options)
}

/// How much of a name an error repeats, in characters. Escaping makes it longer.
const LONGEST_NAME: usize = 100;

/// How many members of an object are read. No message has so many fields, so there are unknown ones among them, and the
/// request is refused whatever the others are.
const MOST_MEMBERS: usize = 200;

struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number is out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Strict(value)) = sequence.next_element()? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while object.len() < MOST_MEMBERS {
            let Some((name, Strict(value))) = members.next_entry::<String, _>()? else {
                return Ok(Value::Object(object));
            };
            match object.entry(name) {
                Entry::Vacant(entry) => drop(entry.insert(value)),
                Entry::Occupied(entry) => {
                    let shown: String = entry.key().chars().take(LONGEST_NAME).collect();
                    return Err(A::Error::custom(format!("member `{}` is given twice", shown.escape_debug())));
                }
            }
        }
        while members.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_value_is_read() {
        let text = r#"{"a": [null, true, -1, 18446744073709551615, 1.5, "é\n"], "b": {}}"#;
        let expected: Value = serde_json::from_str(text).expect("JSON");
        assert_eq!(parse(text.as_bytes()).expect("JSON"), expected);
    }

    #[test]
    fn malformed_json_and_repeated_members_are_refused() {
        let deep = "[".repeat(10_000);
        for text in [
            r#"{"a": 1, "a": 2}"#,
            r#"{"a": {"b": 1, "b": 1}}"#,
            r#"{"a": 1, "\u0061": 2}"#,
            "{",
            "{} {}",
            "NaN",
            "",
            &deep,
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text:.40}");
        }
        assert!(parse(b"\"\xff\"").is_err());
        let members: Vec<_> = (0..5_000).map(|number| format!(r#""{number}": 0"#)).collect();
        let many = format!("{{{}}}", members.join(","));
        assert_eq!(parse(many.as_bytes()).expect("JSON").as_object().map(Map::len), Some(MOST_MEMBERS));
        assert!(parse(many.replace("4999", "\\").as_bytes()).is_err(), "the rest must be JSON too");
        let name = "\u{7f}".repeat(30_000);
        let error = parse(format!(r#"{{"{name}": 1, "{name}": 2}}"#).as_bytes()).expect_err("a name twice");
        assert!(error.to_string().len() < 1_000, "an answer is not larger than its request");
    }
}
