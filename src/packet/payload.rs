//! The payload of requests and answers: any JSON-like value, read strictly.

use std::fmt;
use std::ops::Deref;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value};

/// How deep a payload may be nested.
pub const MAX_DEPTH: usize = 64;

/// A value of any shape: what a request carries and an answer returns.
///
/// It is read strictly in every format: at most [`MAX_DEPTH`] levels, no duplicate keys, no numbers that are not finite.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Payload(pub Value);

impl Payload {
    /// Makes a payload of any serialisable value.
    ///
    /// # Errors
    /// When the value cannot be expressed (a map with keys that are no strings, say).
    pub fn new<T: Serialize>(value: T) -> Result<Self, serde_json::Error> {
        serde_json::to_value(value).map(Payload)
    }

    /// Reads the payload as a type of yours.
    ///
    /// # Errors
    /// When the value has another shape.
    pub fn parse<T: de::DeserializeOwned>(self) -> Result<T, serde_json::Error> {
        serde_json::from_value(self.0)
    }

    /// About how many bytes it takes when it is encoded.
    pub(crate) fn about_bytes(&self) -> usize {
        fn weigh(value: &Value) -> usize {
            match value {
                Value::Null | Value::Bool(_) | Value::Number(_) => 4,
                Value::String(text) => text.len(),
                Value::Array(values) => values.iter().map(weigh).sum(),
                Value::Object(fields) => fields.iter().map(|(name, value)| name.len() + weigh(value)).sum(),
            }
        }
        weigh(&self.0)
    }

    /// The payload a text stands for: JSON where it parses, else the text itself.
    pub fn from_text(text: &str) -> Self {
        serde_json::from_str(text).unwrap_or_else(|_| Payload(Value::String(text.to_owned())))
    }
}

impl Deref for Payload {
    type Target = Value;

    fn deref(&self) -> &Value {
        &self.0
    }
}

impl From<Value> for Payload {
    fn from(value: Value) -> Self {
        Payload(value)
    }
}

impl From<&str> for Payload {
    fn from(text: &str) -> Self {
        Payload(Value::String(text.to_owned()))
    }
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl<'de> Deserialize<'de> for Payload {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Strict { depth: 0 }.deserialize(deserializer).map(Payload)
    }
}

/// Reads one value at a depth.
#[derive(Clone, Copy)]
struct Strict {
    depth: usize,
}

impl Strict {
    fn deeper<E: de::Error>(self) -> Result<Strict, E> {
        if self.depth >= MAX_DEPTH {
            return Err(E::custom(format_args!("nested deeper than {MAX_DEPTH} levels")));
        }
        Ok(Strict { depth: self.depth + 1 })
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("null, a boolean, a number, a text, a list or a map with text keys")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number that is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(inner)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(de::Error::custom("a key stands twice in a map"));
            }
            map.insert(key, entries.next_value_seed(inner)?);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Payload, serde_json::Error> {
        serde_json::from_str(text)
    }

    #[test]
    fn values_are_read_as_they_are() {
        let text = r#"{"a":[1,-2,2.5,null,true,"x"],"b":{}}"#;
        assert_eq!(read(text).unwrap().to_string(), text);
    }

    #[test]
    fn duplicate_keys_and_depth_are_refused() {
        assert!(read(r#"{"a":1,"a":2}"#).unwrap_err().to_string().contains("twice"));
        let nested = |n: usize| "[".repeat(n) + &"]".repeat(n);
        assert!(read(&nested(MAX_DEPTH)).is_ok());
        assert!(read(&nested(MAX_DEPTH + 1)).unwrap_err().to_string().contains("deeper"));
    }

    #[test]
    fn text_is_json_where_it_parses() {
        assert_eq!(Payload::from_text("[1]").0, serde_json::json!([1]));
        assert_eq!(Payload::from_text("hello").0, serde_json::json!("hello"));
    }
}
