//! The primitives of both suites, by OpenSSL. What is fetched from it once is kept here: looking it up costs as much as using it.

use openssl::bn::BigNumContext;
use openssl::cipher::Cipher;
use openssl::cipher_ctx::{CipherCtx, CipherCtxFlags};
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

/// A key or a shared secret: cleared when it is dropped.
pub(super) type Secret = Zeroizing<[u8; 32]>;

/// An operation failed. OpenSSL's own words add nothing and may be empty.
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

/// What is used for every message.
pub(super) struct Crypto {
    gcm: Cipher,
    wrap: Cipher,
    p256: EcGroup,
}

impl Crypto {
    pub fn new() -> Result<Self, ErrorStack> {
        Ok(Self {
            gcm: Cipher::fetch(None, "AES-256-GCM", None)?,
            wrap: Cipher::fetch(None, "AES-256-WRAP", None)?,
            p256: EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?,
        })
    }

    /// Encrypts the parts, one behind the other, into `out`, which has exactly their length.
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

    /// Decrypts; nothing comes out unless the tag is right.
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

    /// AES-256 key wrap (RFC 3394).
    pub fn wrap(&self, kek: &Secret, key: &Secret) -> Result<[u8; WRAPPED], Failed> {
        let mut context = CipherCtx::new()?;
        context.set_flags(CipherCtxFlags::FLAG_WRAP_ALLOW);
        context.encrypt_init(Some(&self.wrap), Some(&kek[..]), None)?;
        // The crate asks for a block more than is written.
        let mut out = Zeroizing::new([0; WRAPPED + 16]);
        let written = context.cipher_update(&key[..], Some(&mut out[..]))?;
        out.get(..written).and_then(|out| out.try_into().ok()).ok_or(Failed)
    }

    /// Undoes [`Crypto::wrap`].
    pub fn unwrap(&self, kek: &Secret, wrapped: &[u8; WRAPPED]) -> Result<Secret, Failed> {
        let mut context = CipherCtx::new()?;
        context.set_flags(CipherCtxFlags::FLAG_WRAP_ALLOW);
        context.decrypt_init(Some(&self.wrap), Some(&kek[..]), None)?;
        let mut out = Zeroizing::new([0; WRAPPED + 16]);
        let written = context.cipher_update(wrapped, Some(&mut out[..]))?;
        out.get(..written).and_then(|out| out.try_into().ok()).map(Zeroizing::new).ok_or(Failed)
    }

    /// A new key for key agreement, and its point.
    pub fn ephemeral(&self) -> Result<(PKey<Private>, [u8; POINT]), Failed> {
        let key = EcKey::generate(&self.p256)?;
        let mut context = BigNumContext::new()?;
        let point = key.public_key().to_bytes(&self.p256, PointConversionForm::UNCOMPRESSED, &mut context)?;
        Ok((PKey::from_ec_key(key)?, point.try_into().map_err(|_| Failed)?))
    }

    /// The public key that a point stands for. A point that is not on the curve is refused.
    pub fn public_key(&self, point: &[u8; POINT]) -> Result<PKey<Public>, Failed> {
        let mut context = BigNumContext::new()?;
        let point = EcPoint::from_bytes(&self.p256, point, &mut context)?;
        Ok(PKey::from_ec_key(EcKey::from_public_key(&self.p256, &point)?)?)
    }

    /// ECDH on P-256. The caller has seen to it that the public key is a point on the curve, so that it needs no second check:
    /// the curve's cofactor is 1, every such point is of the right order.
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

/// The key encryption key: the derivation of ANSI X9.63 with SHA-256, of which one block is enough (RFC 5753, section 7.2).
pub(super) fn key_encryption_key(shared: &Secret, ukm: Option<&[u8]>) -> Result<Secret, Failed> {
    let mut sha = Sha256::new();
    sha.update(&shared[..]);
    sha.update(&1u32.to_be_bytes());
    sha.update(&cms::shared_info(ukm)?);
    Ok(Zeroizing::new(sha.finish()))
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

/// Checks a signature over a SHA-256 digest. OpenSSL takes an ECDSA signature in DER only, and nothing may follow.
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
    // OpenSSL would take a shorter one as a number with leading zeros.
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
