"""What the command line reports of images and guests with `--json`."""

from __future__ import annotations

from .buildreport import Report
from .guest import Change, EvidenceManifest, GuestFinding, GuestState, Snapshot, TrialReport
from .image import Image


class ImageReport(Report, frozen=True, kw_only=True, tag="image"):
    """`stockade image inspect`: one image. `intact`: whether its contents have the recorded digest, where asked."""

    image: Image
    disk_bytes: int
    guests: tuple[str, ...]
    intact: bool | None = None


class ImagesReport(Report, frozen=True, kw_only=True, tag="images"):
    """`stockade image list`: the images in the store."""

    images: tuple[ImageReport, ...]


class GuestsReport(Report, frozen=True, kw_only=True, tag="guests"):
    """`stockade guest list`: the guests of this caller."""

    guests: tuple[GuestState, ...]


class SnapshotsReport(Report, frozen=True, kw_only=True, tag="snapshots"):
    """`stockade snapshot list`: a guest's snapshots, the oldest first."""

    guest: str
    snapshots: tuple[Snapshot, ...]


class SnapshotReport(Report, frozen=True, kw_only=True, tag="snapshot"):
    """`stockade snapshot create`: the snapshot that was made, and how long that took."""

    snapshot: Snapshot
    seconds: float


class EvidenceReport(Report, frozen=True, kw_only=True, tag="evidence"):
    """`stockade guest evidence`: the archive, its digest and what is in it."""

    archive: str
    sha256: str
    manifest: EvidenceManifest


class ChangesReport(Report, frozen=True, kw_only=True, tag="changes"):
    """`stockade guest changes`: what differs from the clean image."""

    guest: str
    changes: tuple[Change, ...]


class TrialsReport(Report, frozen=True, kw_only=True, tag="trial"):
    """`stockade guest trial`: what the change did."""

    trial: TrialReport


class GuestAuditReport(Report, frozen=True, kw_only=True, tag="guest-audit"):
    """`stockade guest audit`: what a guest's system has that it should not have."""

    guest: str
    findings: tuple[GuestFinding, ...]
    fixed: bool = False


MACHINE_REPORTS: tuple[type[Report], ...] = (
    ImageReport, ImagesReport, GuestsReport, SnapshotsReport, SnapshotReport, EvidenceReport, ChangesReport,
    TrialsReport, GuestAuditReport,
)  # fmt: skip
