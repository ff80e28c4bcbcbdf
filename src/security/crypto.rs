//! The primitives of both suites, by OpenSSL. Algorithms are fetched once: fetching one costs as much as using it.

use openssl::bn::BigNumContext;
use openssl::cipher::Cipher;
use openssl::cipher_ctx::CipherCtx;
use openssl::derive::Deriver;
use openssl::ec::{EcGroup, EcKey, EcPoint, PointConversionForm};
use openssl::error::ErrorStack;
use openssl::md::Md;
use openssl::nid::Nid;
use openssl::pkey::{PKey, PKeyRef, Private, Public};
use openssl::pkey_ctx::PkeyCtx;
use openssl::rsa::Padding;
use openssl::sha::Sha256;
use openssl::sign::RsaPssSaltlen;
use zeroize::Zeroizing;

use super::cms::{self, NONCE, POINT, TAG, WRAPPED};
use crate::certs::Suite;

/// A key or a shared secret, zeroed on drop.
pub(super) type Secret = Zeroizing<[u8; 32]>;

/// An operation failed. OpenSSL's error stack adds nothing and may be empty.
#[derive(Debug)]
pub(super) struct Failed;

impl From<ErrorStack> for Failed {
    fn from(_: ErrorStack) -> Self {
        Failed
    }
}

impl From<der::Error> for Failed {
    fn from(_: der::Error) -> Self {
        Failed
    }
}

/// Algorithms that every message needs.
pub(super) struct Crypto {
    gcm: Cipher,
    block: Cipher,
    p256: EcGroup,
}

impl Crypto {
    pub fn new() -> Result<Self, ErrorStack> {
        Ok(Self {
            gcm: Cipher::fetch(None, "AES-256-GCM", None)?,
            block: Cipher::fetch(None, "AES-256-ECB", None)?,
            p256: EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?,
        })
    }

    /// Encrypts the concatenated parts into `out`, which has exactly their length.
    pub fn encrypt(
        &self,
        key: &Secret,
        nonce: &[u8; NONCE],
        parts: &[&[u8]],
        out: &mut [u8],
    ) -> Result<[u8; TAG], Failed> {
        let mut context = CipherCtx::new()?;
        context.encrypt_init(Some(&self.gcm), Some(&key[..]), Some(nonce))?;
        let mut rest = out;
        for part in parts {
            let (room, after) = rest.split_at_mut_checked(part.len()).ok_or(Failed)?;
            context.cipher_update(part, Some(room))?;
            rest = after;
        }
        context.cipher_final(&mut [])?;
        let mut tag = [0; TAG];
        context.tag(&mut tag)?;
        Ok(tag)
    }

    /// Decrypts; returns nothing unless the tag is valid.
    pub fn decrypt(
        &self,
        key: &Secret,
        nonce: &[u8; NONCE],
        ciphertext: &[u8],
        tag: &[u8; TAG],
    ) -> Result<Vec<u8>, Failed> {
        let mut context = CipherCtx::new()?;
        context.decrypt_init(Some(&self.gcm), Some(&key[..]), Some(nonce))?;
        let mut out = vec![0; ciphertext.len()];
        context.cipher_update(ciphertext, Some(&mut out))?;
        context.set_tag(tag)?;
        context.cipher_final(&mut [])?;
        Ok(out)
    }

    /// AES-256 key wrap (RFC 3394, section 2.2.1) of a key of 32 bytes. It is built from single blocks because OpenSSL's own key wrap
    /// does not use the AES instructions of the processor: it takes four times as long, and indexes tables by secret bytes.
    pub fn wrap(&self, kek: &Secret, key: &Secret) -> Result<[u8; WRAPPED], Failed> {
        let mut context = CipherCtx::new()?;
        context.encrypt_init(Some(&self.block), Some(&kek[..]), None)?;
        context.set_padding(false);
        let mut blocks =
            Blocks { check: CHECK, halves: Zeroizing::new(*key.as_chunks().0.first_chunk().ok_or(Failed)?) };
        for step in 1..=STEPS {
            let half = usize::try_from((step - 1) % 4).map_err(|_| Failed)?;
            blocks.step(&mut context, half, None, Some(step))?;
        }
        let mut out = [0; WRAPPED];
        let parts = std::iter::once(&blocks.check).chain(blocks.halves.iter());
        out.as_chunks_mut().0.iter_mut().zip(parts).for_each(|(out, part)| *out = *part);
        Ok(out)
    }

    /// Undoes [`Crypto::wrap`].
    pub fn unwrap(&self, kek: &Secret, wrapped: &[u8; WRAPPED]) -> Result<Secret, Failed> {
        let mut context = CipherCtx::new()?;
        context.decrypt_init(Some(&self.block), Some(&kek[..]), None)?;
        context.set_padding(false);
        let (check, halves) = wrapped.as_chunks().0.split_first().ok_or(Failed)?;
        let mut blocks = Blocks { check: *check, halves: Zeroizing::new(*halves.first_chunk().ok_or(Failed)?) };
        for step in (1..=STEPS).rev() {
            let half = usize::try_from((step - 1) % 4).map_err(|_| Failed)?;
            blocks.step(&mut context, half, Some(step), None)?;
        }
        if !openssl::memcmp::eq(&blocks.check, &CHECK) {
            return Err(Failed);
        }
        let mut key = Zeroizing::new([0; 32]);
        key.as_chunks_mut().0.iter_mut().zip(blocks.halves.iter()).for_each(|(out, half)| *out = *half);
        Ok(key)
    }

    /// A new key for key agreement, and its point.
    pub fn ephemeral(&self) -> Result<(PKey<Private>, [u8; POINT]), Failed> {
        let key = EcKey::generate(&self.p256)?;
        let mut context = BigNumContext::new()?;
        let point = key.public_key().to_bytes(&self.p256, PointConversionForm::UNCOMPRESSED, &mut context)?;
        Ok((PKey::from_ec_key(key)?, point.try_into().map_err(|_| Failed)?))
    }

    /// The public key of a point. Refuses a point that is not on the curve.
    pub fn public_key(&self, point: &[u8; POINT]) -> Result<PKey<Public>, Failed> {
        let mut context = BigNumContext::new()?;
        let point = EcPoint::from_bytes(&self.p256, point, &mut context)?;
        Ok(PKey::from_ec_key(EcKey::from_public_key(&self.p256, &point)?)?)
    }

    /// ECDH on P-256. The caller has checked that the public key is a point on the curve; no second check is needed: the cofactor of the
    /// curve is 1, so every such point has the right order.
    pub fn agree(&self, own: &PKeyRef<Private>, public: &PKeyRef<Public>) -> Result<Secret, Failed> {
        let mut deriver = Deriver::new(own)?;
        deriver.set_peer_ex(public, false)?;
        let mut secret = Zeroizing::new([0; 32]);
        if deriver.derive(&mut secret[..])? != 32 {
            return Err(Failed);
        }
        Ok(secret)
    }
}

/// The initial value of key wrap (RFC 3394, section 2.2.3.1).
const CHECK: [u8; 8] = [0xa6; 8];
/// The steps of wrapping four half blocks.
const STEPS: u64 = 6 * 4;

/// The state of key wrap.
struct Blocks {
    check: [u8; 8],
    halves: Zeroizing<[[u8; 8]; 4]>,
}

impl Blocks {
    /// One step: the number of the step is mixed in before (unwrapping) or after (wrapping) the block goes through the cipher.
    fn step(
        &mut self,
        context: &mut CipherCtx,
        half: usize,
        before: Option<u64>,
        after: Option<u64>,
    ) -> Result<(), Failed> {
        let half = self.halves.get_mut(half).ok_or(Failed)?;
        let mix = |check: [u8; 8], step: Option<u64>| (u64::from_be_bytes(check) ^ step.unwrap_or(0)).to_be_bytes();
        let block = Zeroizing::new([mix(self.check, before), *half]);
        // The crate requires one more block in the output.
        let mut out = Zeroizing::new([[0; 8]; 4]);
        if context.cipher_update(block.as_flattened(), Some(out.as_flattened_mut()))? != 16 {
            return Err(Failed);
        }
        let [check, new, ..] = *out;
        self.check = mix(check, after);
        *half = new;
        Ok(())
    }
}

/// SHA-256 over the concatenated parts. (OpenSSL's one-shot function looks the algorithm up every time.)
pub(super) fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut sha = Sha256::new();
    parts.iter().for_each(|part| sha.update(part));
    sha.finish()
}

/// The key encryption key: the derivation of ANSI X9.63 with SHA-256, one block of it (RFC 5753, section 7.2).
pub(super) fn key_encryption_key(shared: &Secret, ukm: Option<&[u8]>) -> Result<Secret, Failed> {
    Ok(Zeroizing::new(sha256(&[&shared[..], &1u32.to_be_bytes(), &cms::shared_info(ukm)?])))
}

/// Signs a SHA-256 digest.
pub(super) fn sign(key: &PKeyRef<Private>, suite: Suite, digest: &[u8; 32]) -> Result<Vec<u8>, Failed> {
    let mut context = PkeyCtx::new(key)?;
    context.sign_init()?;
    if suite == Suite::Rsa {
        pss(&mut context)?;
    }
    let mut signature = Vec::new();
    context.sign_to_vec(digest, &mut signature)?;
    Ok(signature)
}

/// Checks a signature over a SHA-256 digest. OpenSSL accepts an ECDSA signature in DER only, with nothing after it.
pub(super) fn verify(key: &PKeyRef<Public>, suite: Suite, digest: &[u8; 32], signature: &[u8]) -> Result<(), Failed> {
    let mut context = PkeyCtx::new(key)?;
    context.verify_init()?;
    if suite == Suite::Rsa {
        pss(&mut context)?;
    }
    if context.verify(digest, signature)? { Ok(()) } else { Err(Failed) }
}

fn pss<T>(context: &mut PkeyCtx<T>) -> Result<(), ErrorStack> {
    context.set_rsa_padding(Padding::PKCS1_PSS)?;
    context.set_signature_md(Md::sha256())?;
    context.set_rsa_mgf1_md(Md::sha256())?;
    context.set_rsa_pss_saltlen(RsaPssSaltlen::custom(32))
}

fn oaep<T>(context: &mut PkeyCtx<T>) -> Result<(), ErrorStack> {
    context.set_rsa_padding(Padding::PKCS1_OAEP)?;
    context.set_rsa_oaep_md(Md::sha256())?;
    context.set_rsa_mgf1_md(Md::sha256())
}

/// RSAES-OAEP.
pub(super) fn transport(key: &PKeyRef<Public>, secret: &Secret) -> Result<Vec<u8>, Failed> {
    let mut context = PkeyCtx::new(key)?;
    context.encrypt_init()?;
    oaep(&mut context)?;
    let mut out = Vec::new();
    context.encrypt_to_vec(&secret[..], &mut out)?;
    Ok(out)
}

/// Undoes [`transport`].
pub(super) fn receive(key: &PKeyRef<Private>, encrypted: &[u8]) -> Result<Secret, Failed> {
    // OpenSSL would accept a shorter one as a number with leading zeros.
    if encrypted.len() != key.size() {
        return Err(Failed);
    }
    let mut context = PkeyCtx::new(key)?;
    context.decrypt_init()?;
    oaep(&mut context)?;
    let mut out = Zeroizing::new(Vec::new());
    context.decrypt_to_vec(encrypted, &mut out)?;
    out.as_slice().try_into().map(Zeroizing::new).map_err(|_| Failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex<const N: usize>(text: &str) -> [u8; N] {
        let bytes: Vec<u8> =
            (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect();
        bytes.try_into().unwrap()
    }

    #[test]
    fn key_wrap_is_that_of_rfc_3394() {
        // Section 4.6.
        let kek = Zeroizing::new(hex("000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F"));
        let key = Zeroizing::new(hex("00112233445566778899AABBCCDDEEFF000102030405060708090A0B0C0D0E0F"));
        let wrapped = hex("28C9F404C4B810F4CBCCB35CFB87F8263F5786E2D80ED326CBC7F0E71A99F43BFB988B9B7A02DD21");
        let crypto = Crypto::new().unwrap();
        assert_eq!(crypto.wrap(&kek, &key).unwrap(), wrapped);
        assert_eq!(crypto.unwrap(&kek, &wrapped).unwrap(), key);
    }

    #[test]
    fn a_wrapped_key_with_any_bit_changed_is_refused() {
        let crypto = Crypto::new().unwrap();
        let (kek, key) = (Zeroizing::new([1; 32]), Zeroizing::new([2; 32]));
        let wrapped = crypto.wrap(&kek, &key).unwrap();
        for bit in 0..WRAPPED * 8 {
            let mut changed = wrapped;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(crypto.unwrap(&kek, &changed).is_err(), "{bit}");
        }
        assert!(crypto.unwrap(&Zeroizing::new([3; 32]), &wrapped).is_err());
    }

    #[test]
    fn content_is_decrypted_only_with_its_tag() {
        let crypto = Crypto::new().unwrap();
        let key = Zeroizing::new([7; 32]);
        let mut ciphertext = [0; 6];
        let tag = crypto.encrypt(&key, &[1; 12], &[b"ab", b"", b"cdef"], &mut ciphertext).unwrap();
        assert_eq!(crypto.decrypt(&key, &[1; 12], &ciphertext, &tag).unwrap(), b"abcdef");
        assert!(crypto.decrypt(&key, &[1; 12], &ciphertext, &[0; 16]).is_err());
        assert!(crypto.decrypt(&key, &[2; 12], &ciphertext, &tag).is_err());
        assert!(crypto.encrypt(&key, &[1; 12], &[b"longer than the output"], &mut ciphertext).is_err());
    }

    #[test]
    fn points_that_are_not_on_the_curve_are_refused() {
        let crypto = Crypto::new().unwrap();
        let (own, point) = crypto.ephemeral().unwrap();
        let (other, other_point) = crypto.ephemeral().unwrap();
        let here = crypto.agree(&own, &crypto.public_key(&other_point).unwrap()).unwrap();
        let there = crypto.agree(&other, &crypto.public_key(&point).unwrap()).unwrap();
        assert_eq!(here, there);
        let mut off = point;
        off[64] ^= 1;
        assert!(crypto.public_key(&off).is_err());
        let mut zero = [0; POINT];
        zero[0] = 4;
        assert!(crypto.public_key(&zero).is_err());
    }

    #[test]
    fn transported_keys_are_as_long_as_the_modulus() {
        use crate::certs::{KeyType, PrivateKey};
        let key = PrivateKey::generate(KeyType::Rsa2048).unwrap();
        let public = PKey::public_key_from_der(&key.pkey().public_key_to_der().unwrap()).unwrap();
        let secret = Zeroizing::new([5; 32]);
        let encrypted = transport(&public, &secret).unwrap();
        assert_eq!(receive(key.pkey(), &encrypted).unwrap(), secret);
        let longer = [&[0][..], &encrypted].concat();
        for other in [&encrypted[1..], &longer, &[]] {
            assert!(receive(key.pkey(), other).is_err());
        }
    }

    #[test]
    fn signatures_of_both_suites_are_strict() {
        use crate::certs::{KeyType, PrivateKey};
        for key_type in [KeyType::P256, KeyType::Rsa2048] {
            let key = PrivateKey::generate(key_type).unwrap();
            let public = PKey::public_key_from_der(&key.pkey().public_key_to_der().unwrap()).unwrap();
            let signature = sign(key.pkey(), key.suite(), &[5; 32]).unwrap();
            assert!(verify(&public, key.suite(), &[5; 32], &signature).is_ok());
            assert!(verify(&public, key.suite(), &[6; 32], &signature).is_err());
            assert!(verify(&public, key.suite(), &[5; 32], &[&signature[..], &[0]].concat()).is_err());
            assert!(verify(&public, key.suite(), &[5; 32], &signature[..signature.len() - 1]).is_err());
        }
    }
}
