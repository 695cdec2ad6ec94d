"""De-identification of DICOM: what names a patient, and whether a file may be used. It fails closed. Torch-free.

The cache never holds a DICOM element, only pixels and the few facts of :class:`DicomFacts`; so the question is
whether the user knows that a file names a patient (``deidentify``), and whether its pixels may show it
(BurnedInAnnotation). Elements are listed by their keyword; their values are not kept anywhere.

Source: DICOM PS3.15, annex E, table E.1-1 (attributes of the basic profile), reduced to those that name a person,
place, number or day.
"""

import hashlib
import hmac
from collections.abc import Iterator
from dataclasses import dataclass

import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

__all__ = ["DicomFacts", "hash_patient", "identifying_elements", "patient_words", "refusal"]

IDENTIFYING = frozenset((
    "AccessionNumber", "AcquisitionDate", "AcquisitionDateTime", "AdmissionID", "AdmittingDate", "BranchOfService",
    "ContentDate", "CountryOfResidence", "CurrentPatientLocation", "DeviceSerialNumber", "EthnicGroup",
    "ImageComments", "InstanceCreationDate", "InstitutionAddress", "InstitutionName", "InstitutionalDepartmentName",
    "IssuerOfPatientID", "MedicalAlerts", "MedicalRecordLocator", "MilitaryRank", "Occupation", "OtherPatientIDs",
    "PatientAddress", "PatientAge", "PatientBirthDate", "PatientBirthTime", "PatientComments", "PatientID",
    "PatientInstitutionResidence", "PatientInsurancePlanCodeSequence", "PatientName", "PatientReligiousPreference",
    "PatientSize", "PatientTelephoneNumbers", "PatientWeight", "PerformedProcedureStepStartDate",
    "ProtocolName", "RegionOfResidence", "RequestedProcedureDescription", "SeriesDate", "SeriesDescription",
    "StationName", "StudyDate", "StudyDescription", "StudyID",
))  # fmt: skip
"""Beside these every person name, private element and curve or overlay plane counts."""


@dataclass(frozen=True, kw_only=True)
class DicomFacts:
    """All that is used of a DICOM header."""

    num_frames: int
    rows: int
    columns: int
    fps: float | None
    modality: str
    burned_in: str
    """``YES``, ``NO`` or empty where the file does not say."""


def identifying_elements(header: Dataset) -> tuple[str, ...]:
    """Keywords of all elements with a value that may name a patient, at any depth, sorted."""
    found = set()
    for element in _elements(header):
        if element.is_empty:
            continue
        if element.tag.is_private:
            found.add(f"private element {element.tag}")
        elif element.VR == "PN" or element.keyword in IDENTIFYING:
            found.add(element.keyword or str(element.tag))
        elif 0x5000 <= element.tag.group <= 0x501E or 0x6000 <= element.tag.group <= 0x601E:
            found.add(f"overlay or curve {element.tag}")
    return tuple(sorted(found))


def _elements(dataset: Dataset) -> Iterator[DataElement]:
    for element in dataset:
        yield element
        if element.VR == "SQ":
            for item in element.value or ():
                yield from _elements(item)


def refusal(facts: DicomFacts, identifying: tuple[str, ...], *, deidentify: bool, is_covered: bool) -> str | None:
    """Why a file may not be used, or None.

    Args:
        identifying: Of :func:`identifying_elements`.
        deidentify: The user has asked for de-identification.
        is_covered: The user has given a mask or a crop, or has said that burned-in pixels are acceptable.
    """
    if identifying and not deidentify:
        shown = ", ".join(identifying[:6]) + (", ..." if len(identifying) > 6 else "")
        return f"names a patient ({len(identifying)} elements: {shown}); use --deidentify"
    if facts.burned_in != "NO" and not is_covered:
        said = f"is {facts.burned_in}" if facts.burned_in else "is missing"
        return (
            f"BurnedInAnnotation {said}: its pixels may show the patient's name; give a mask or a crop that covers "
            "it, or --burned-in accept once you have looked"
        )
    return None


def hash_patient(patient_id: str, salt: str) -> str:
    """Group name that stands for a patient: keyed, so that it cannot be found by trying all numbers."""
    digest = hmac.new(salt.encode(), patient_id.strip().encode(), hashlib.sha256).hexdigest()
    return f"patient-{digest[:12]}"


def patient_words(header: Dataset) -> frozenset[str]:
    """Lower-case words of at least three letters of the patient's name and number: none may get into the cache."""
    words: set[str] = set()
    for keyword in ("PatientName", "PatientID", "OtherPatientIDs", "PatientBirthDate"):
        text = str(header.get(keyword, "") or "")
        for mark in "^=_-./\\,;[]'\"":
            text = text.replace(mark, " ")
        words.update(word.lower() for word in text.split() if len(word) >= 3)
    return frozenset(words)


def read_header(path: str) -> Dataset:
    """Everything before the pixels."""
    return pydicom.dcmread(path, stop_before_pixels=True)
