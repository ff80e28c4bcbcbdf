//! Any bytes as a body in each codec: nothing panics, and a body that decodes is the same packet after it was encoded again, in that codec
//! and in the others.

use nanite::serializer::{Codec, Json, MsgPack, Yaml};

/// The target.
pub fn run(data: &[u8]) {
    let codecs: [&dyn Codec; 3] = [&Json, &MsgPack, &Yaml];
    for codec in codecs {
        let Ok(packet) = codec.decode(data) else { continue };
        for other in codecs {
            let encoded = other.encode(&packet).unwrap_or_else(|error| panic!("{packet:?}: {error}"));
            let again = other.decode(&encoded).unwrap_or_else(|error| {
                panic!(
                    "{} to {}: {error}: {packet:?}: {:?}",
                    codec.name(),
                    other.name(),
                    String::from_utf8_lossy(&encoded)
                )
            });
            assert_eq!(again, packet, "{} to {}: {:?}", codec.name(), other.name(), String::from_utf8_lossy(&encoded));
        }
    }
}
