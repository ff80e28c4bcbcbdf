//! How our own types are given as arguments.

use clap::ValueEnum;
use clap::builder::PossibleValue;

use crate::certs::KeyType;
use crate::packet::{Role, SelectorName};

impl ValueEnum for Role {
    fn value_variants<'a>() -> &'a [Self] {
        &[Role::Agent, Role::Mapper]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.as_str()))
    }
}

impl ValueEnum for KeyType {
    fn value_variants<'a>() -> &'a [Self] {
        &KeyType::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.as_str()))
    }
}

impl ValueEnum for SelectorName {
    fn value_variants<'a>() -> &'a [Self] {
        &SelectorName::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.as_str()))
    }
}
