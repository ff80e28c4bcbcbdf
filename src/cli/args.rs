//! How our own types are given as arguments.

use clap::ValueEnum;
use clap::builder::PossibleValue;

use crate::certs::{KeyType, RevocationReason};
use crate::packet::{Role, SelectorName};
use crate::serializer::InboundQueue;

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

impl ValueEnum for InboundQueue {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::AgentInbox, Self::AgentControl, Self::MapperInbox, Self::Presence, Self::Requests, Self::Offline]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.as_str()))
    }
}

impl ValueEnum for RevocationReason {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::KeyCompromise, Self::Superseded, Self::CessationOfOperation, Self::Unspecified]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(match self {
            Self::KeyCompromise => "key-compromise",
            Self::Superseded => "superseded",
            Self::CessationOfOperation => "cessation-of-operation",
            Self::Unspecified => "unspecified",
        }))
    }
}
