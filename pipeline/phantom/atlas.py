"""The atlas of synthetic patients: an analytic body.

Positions are z, y, x in mm from the midline at the level of the carina, towards the head, the back
and the patient's left. The body is a list of solids. It is a trunk from the base of the neck to the
hips, without arms. It models no disease, and uses no data of real patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Final

import numpy as np

from pipeline.phantom.solids import (
    AIR,
    BLOOD,
    BONE,
    BOWEL,
    CARTILAGE,
    CORD,
    CORTEX,
    DISC,
    FAR,
    FAT,
    FLUID,
    GLAND,
    KIDNEY,
    LIVER,
    LUNG,
    MUSCLE,
    MYOCARDIUM,
    SKIN,
    SPLEEN,
    SPONGY,
    STOOL,
    Field,
    Outline,
    Painting,
    Point,
    Profile,
    Solid,
    belonging,
    blob,
    both,
    common,
    length,
    path,
    tree,
    tubes,
)

# fmt: off
TRUNK: Final = Outline(
    Profile((180, 64), (152, 74), (132, 116), (112, 160), (80, 178), (40, 176), (0, 171),
            (-60, 169), (-125, 166), (-200, 159), (-260, 153), (-330, 161), (-400, 176),
            (-460, 183)),
    Profile((180, 62), (150, 63), (130, 71), (105, 84), (60, 100), (0, 111), (-60, 116),
            (-125, 117), (-200, 114), (-270, 109), (-340, 109), (-420, 115), (-520, 113)),
    Profile((180, 8), (130, 12), (85, 10), (20, 8), (-50, 6), (-125, 4), (-210, 2), (-330, 2),
            (-420, 8)))
CAGE: Final = Outline(
    Profile((112, 30), (92, 58), (60, 94), (30, 116), (0, 131), (-60, 145), (-125, 148),
            (-190, 145), (-260, 139)),
    Profile((112, 30), (92, 44), (60, 62), (30, 78), (0, 89), (-60, 96), (-125, 97), (-190, 93),
            (-260, 86)),
    Profile((112, 27), (60, 18), (0, 8), (-60, 4), (-125, 2), (-260, 0)))
BELLY: Final = Outline(
    Profile((-100, 137), (-200, 134), (-260, 126), (-330, 124), (-400, 112), (-460, 88),
            (-520, 70)),
    Profile((-100, 87), (-200, 82), (-260, 73), (-330, 70), (-400, 72), (-520, 66)),
    Profile((-100, 0), (-200, -6), (-260, -12), (-330, -12), (-400, -6), (-520, -4)))
SPINE: Final = Profile((180, 30), (130, 34), (85, 48), (20, 62), (-50, 66), (-125, 60), (-210, 44),
                       (-270, 36), (-330, 41), (-375, 56))
VERTEBRAE: Final[dict[str, float]] = {  # the middle of each body
    "C4": 149, "C5": 133, "C6": 117, "C7": 100, "T1": 81, "T2": 61, "T3": 40, "T4": 18, "T5": -5,
    "T6": -28, "T7": -52, "T8": -76, "T9": -101, "T10": -126, "T11": -152, "T12": -179, "L1": -208,
    "L2": -240, "L3": -273, "L4": -307, "L5": -340}
LANDMARKS: Final[dict[str, Point]] = {
    "carina": (2, 12, 0), "aortic_arch": (25, 2, 13), "heart_centre": (-62, -22, 36),
    "right_lung_apex": (78, 16, -42), "left_lung_apex": (78, 16, 42),
    "right_lung_base": (-140, 66, -85), "left_lung_base": (-140, 66, 85),
    "liver_dome": (-118, -10, -66), "spleen": (-178, 38, 98), "stomach_gas": (-172, -52, 62),
    "right_kidney": (-252, 30, -66), "left_kidney": (-236, 30, 68), "sacrum": (-400, 66, 0),
    "right_femoral_head": (-482, 6, -96), "left_femoral_head": (-482, 6, 96),
    "right_humeral_head": (108, 12, -138), "left_humeral_head": (108, 12, 138),
    "sternal_notch": (47, CAGE.middle.at(47) - CAGE.depth.at(47) + 1, 0),
    "xiphoid": (-90, CAGE.middle.at(-90) - CAGE.depth.at(-90) + 1, 0),
    "aortic_root": (-46, -28, 8), "aortic_bifurcation": (-304, 8, 5),
    "left_ventricle": (-70, -22, 48), "right_atrium": (-60, -20, -18),
    "gallbladder": (-236, -48, -58), "pancreas_head": (-218, -4, -10),
    "right_renal_hilum": (-252, 23, -48), "left_renal_hilum": (-236, 23, 48),
    "right_iliac_crest": (-308, 10, -111), "left_iliac_crest": (-308, 10, 111),
    "bladder": (-478, -28, 0),
    **{f"vertebra_{name}": (z, SPINE.at(z), 0.0) for name, z in VERTEBRAE.items()}}
RIBS: Final[tuple[tuple[float, int, float | None], ...]] = (
    # how far it drops, the angle of its end from the back, where its cartilage meets the sternum
    (30, 150, 48), (46, 152, 17), (58, 154, -2), (68, 154, -22), (74, 154, -44), (76, 152, -66),
    (78, 148, -86), (80, 138, None), (80, 128, None), (78, 118, None), (60, 95, None),
    (42, 70, None))
# fmt: on


def _diaphragm(y: Field, x: Field) -> Field:
    """Height of the two domes, the right one higher."""
    side, back = np.abs(x) - 68, y + 10
    fall: Field = np.where(side > 0, 0.0085, 0.003) * side * side + 0.009 * back * back
    return -115 - fall - np.clip(x / 5, -8, 8)


def _lungs(z: Field, y: Field, x: Field) -> Field:
    wall = (CAGE.radius(z, y, x) - 1) * 95 + 10
    beside = np.abs(x)
    apex = z - 90 + 0.02 * ((beside - 42) ** 2 + (y - 14) ** 2)
    base = 0.7 * (_diaphragm(y, x) - z)
    return common(wall, apex, base, 5 - beside)


def _belly(z: Field, y: Field, x: Field) -> Field:
    return common((BELLY.radius(z, y, x) - 1) * 85, 0.7 * (z - _diaphragm(y, x)))


def _liver(z: Field, y: Field, x: Field) -> Field:
    under = -270 + 0.0036 * (x + 130) ** 2 + 0.6 * (y + 15)  # the visceral surface
    return common(_belly(z, y, x) + 3, 0.7 * (under - z))


def _iliac(z: Field, y: Field, x: Field) -> Field:
    bowl = length((z + 320) / 190, (y + 40) / 110, x / 125)
    crest = z + 302 + 0.009 * (y - 10) ** 2
    front = -58 + 0.45 * np.maximum(-350 - z, 0) - y
    plate = np.abs(bowl - 1) * 110 - 5.5
    return common(plate, crest, front, y - 72, 38 - np.abs(x), -490 - z)


def _under_diaphragm(solid: Solid) -> Solid:
    uncut = solid.distance
    return solid._replace(distance=lambda z, y, x: common(uncut(z, y, x), _belly(z, y, x) + 3))


def _sternum(z: Field, y: Field, x: Field) -> Field:
    front = CAGE.middle(z) - CAGE.depth(z) + 1
    side = np.abs(x) - 16 - 6 * np.clip((z - 18) / 12, 0, 1)
    return common(side, np.abs(y - front) - 5.5, np.abs(z + 22) - 70)


def _half_depth(z: float) -> float:
    """Half the front-to-back depth of the vertebral body at height z."""
    return float(np.interp(z, (-340, -200, 80, 150), (18, 16, 11, 9)))


def _along_spine(low: int, high: int, step: int, *, behind: float = 0, x: float = 0) -> list[Point]:
    return [(z, SPINE.at(z) + behind, x) for z in range(low, high, step)]


def _vertebral_body(middle: float, half: float) -> Solid:
    """A cylinder with a waist, from `middle - half` to `middle + half`."""
    y0, depth = SPINE.at(middle), _half_depth(middle)
    width = 1.32 * depth

    def distance(z: Field, y: Field, x: Field) -> Field:
        waist = 0.92 + 0.08 * ((z - middle) / half) ** 2
        around = np.sqrt(((y - y0) / depth) ** 2 + (x / width) ** 2) - waist
        return common(around * depth, np.abs(z - middle) - half)

    return Solid((middle, y0, 0), (half + 1, depth + 1, width + 1), distance, BONE)


def _rib(start: float, drop: float, end: int) -> list[Point]:
    """Path of a left rib's bone, from a vertebra at `start` down and around to `end` degrees."""
    angle = np.deg2rad(np.linspace(38, end, 3 + end // 12))
    z = start - drop * (1 - np.cos(angle)) / 2
    course = np.stack([z, *CAGE.around(z, angle, 0.95)], axis=1).tolist()
    spine = SPINE.at(start) + _half_depth(start)
    return [(start + 4, spine, 16), (start, spine + 17, 38), *map(tuple, course)]


# fmt: off
@cache
def atlas() -> Painting:
    """The body without disease."""
    return Painting([*_wall(), *_chest(), *_belly_organs(), *_heart_and_vessels(), *_skeleton()])


def _wall() -> list[Solid]:
    skin = Solid((0, 5, 0), (FAR, 130, 195), lambda z, y, x: (TRUNK.radius(z, y, x) - 1) * 112,
                 ((0, SKIN), (2, FAT), (12, MUSCLE)))
    return [skin, *both(
        blob((42, 22, 148), (46, 30, 16), FAT),  # armpit
        blob((42, 74, 92), (58, 4.5, 42), BONE, (24, 0, 0)),  # scapula
        blob((108, 12, 138), (22, 22, 22), BONE))]  # head of humerus


def _chest() -> list[Solid]:
    lungs = Solid((-72, 0, 0), (168, 110, 160), _lungs, ((-3.5, MUSCLE), (0, LUNG)), "lung")
    trees = [vessel for s in (-1, 1) for vessel in (
        *tree(lungs, (-18, -2, 34 * s), 260, 7.5, BLOOD),  # arteries
        *tree(lungs, (-38, 6, 30 * s), 140, 6.5, BLOOD),  # veins
        *tree(lungs, (-26, 14, 34 * s), 16, 6.2, ((0, MUSCLE), (1.5, AIR))))]  # airways
    return [
        lungs, *belonging("lung", trees),
        blob((-20, -16, 2), (150, 72, 27), FAT),  # mediastinum
        blob((110, 14, 0), (95, 32, 38), MUSCLE),  # root of the neck
        *path(_along_spine(-215, 125, 20, behind=6), 27, MUSCLE),
        *both(*path(_along_spine(-215, 125, 20, behind=23, x=24), 17, MUSCLE))]


def _belly_organs() -> list[Solid]:
    wall = Solid((-95 - FAR, -5, 0), (FAR, 95, 145), _belly, ((0, MUSCLE), (3.5, FAT)))
    liver = Solid((-220, -5, -18), (120, 90, 118), _liver, ((0, LIVER),), "liver")
    stomach = _under_diaphragm(
        blob((-174, -28, 60), (54, 48, 38), ((0, BOWEL), (5, FLUID)), (-15, -20, 0)))
    stomach = stomach._replace(organ="stomach")
    gas = stomach._replace(  # at the front of a patient who lies on the back
        layers=((0, AIR),), distance=lambda z, y, x: common(stomach.distance(z, y, x) + 5, y + 40))
    kidneys = [kidney for s, z in ((-1, -252), (1, -236)) for kidney in (
        blob((z, 32, 63 * s), (54, 25, 29), KIDNEY, (35 * s, -10 * s, 0))._replace(organ="kidney"),
        blob((z, 23, 48 * s), (26, 10, 14), FAT, (35 * s, -10 * s, 0)))]
    colon: list[Point] = [
        (-430, 0, -82), (-345, 18, -98), (-290, 8, -96), (-296, -52, -62), (-312, -60, 0),
        (-290, -55, 60), (-236, 4, 104), (-330, 24, 104), (-395, 14, 88), (-425, -8, 40),
        (-440, 22, 8), (-500, 40, 0)]
    t = np.linspace(0, 1, 180)
    loops = np.stack([-228 - 200 * t + 9 * np.sin(53 * t), -34 + 25 * np.sin(43 * t),
                      48 * (1 - t) ** 2 + (40 + 26 * t) * np.sin(119 * t)], axis=1)
    small_bowel: list[Point] = list(map(tuple, loops.tolist()))
    return [
        wall, *path(_along_spine(-400, -200, 20, behind=4), 27, MUSCLE),
        *both(*path([(-212, 34, 28), (-330, 24, 47), (-455, -8, 80)], (11, 20, 17), MUSCLE)),
        liver, *belonging("liver", tree(liver, (-196, -8, -32), 40, 6.5, BLOOD)),
        blob((-236, -48, -58), (27, 13, 14), FLUID, (0, 0, 25))._replace(organ="gallbladder"),
        _under_diaphragm(blob((-178, 38, 98), (50, 40, 23), SPLEEN, (30, 0, 15)))._replace(
            organ="spleen"),
        *kidneys,
        *belonging("pancreas", path(
            [(-222, 0, -22), (-212, -8, 4), (-206, -2, 40), (-198, 14, 76)], 11, GLAND)),
        stomach, gas,
        *belonging("colon", path(colon, 19, ((0, BOWEL), (3, STOOL)))),
        *belonging("small_bowel", path(small_bowel, 11.5, ((0, BOWEL), (3, FLUID)))),
        *belonging("colon", (
            blob((z - 12, y - 6, x), (20, 9, 12), AIR) for z, y, x in colon[:8])),
        *belonging("small_bowel", (
            blob((z, y - 4, x), (7, 4, 8), AIR) for z, y, x in small_bowel[5::14])),
        blob((-478, -28, 0), (30, 30, 36), ((0, MUSCLE), (4, FLUID)))._replace(organ="bladder")]


def _heart_and_vessels() -> list[Solid]:
    turn, fork = (-38, 0, 28), (0, 12, 0)
    chambers: list[tuple[Point, Point]] = [  # left and right ventricle, left and right atrium
        ((-70, -22, 48), (25, 22, 36)), ((-74, -46, 20), (26, 14, 40)),
        ((-46, 8, 16), (24, 15, 30)), ((-60, -20, -18), (32, 24, 18))]
    vessels: list[tuple[list[Point], float | Sequence[float]]] = [
        ([(-46, -28, 8), (-15, -32, -16), (12, -22, -10), (24, -8, 4), (25, 10, 15), (12, 30, 24),
          (-15, 36, 27), (-70, 38, 25), (-130, 32, 14), (-208, 14, 7), (-304, 8, 5)],
         (15, 15, 14.5, 14, 13.5, 12.5, 12, 11.5, 11, 10, 8.5)),  # aorta
        ([(-95, -4, -20), (-130, 2, -24), (-210, 10, -23), (-306, 14, -15)], 11),  # venae cavae
        ([(-52, -20, -22), (-10, -16, -27), (50, -22, -22), (72, -16, -28)], 9),
        ([(-44, -46, 16), (-14, -32, 20), (-8, -8, 26), (-16, 0, 36)], 12),  # pulmonary arteries
        ([(-10, -20, 18), (-18, -6, -12), (-18, -2, -34)], 10.5)]
    for s in (-1, 1):  # to the neck, the arm, the leg, the kidney
        vessels += [([(22, -6, 6), (58, -10, 14 * s), (180, -2, 27 * s)], 4.5),
                    ([(180, -2, 36 * s), (76, -16, 30 * s), (86, -16, 90 * s)], 6),
                    ([(-304, 8, 4), (-375, 22, 36 * s), (-470, -38, 72 * s)], 6.5),
                    ([(-234, 10, 6), (-240, 22, 46 * s)], 4)]
    gullet: list[Point] = [(180, 12, 4), (40, 30, 5), (-60, 24, 8), (-135, 10, 16), (-160, -12, 40)]
    return [
        blob((-66, -26, 26), (53, 49, 66), ((0, FAT), (4, MYOCARDIUM)), turn)._replace(
            organ="heart"),
        *belonging("heart", (blob(centre, radii, BLOOD, turn) for centre, radii in chambers)),
        *belonging("aorta", path(*vessels[0], BLOOD)),
        *belonging(None, (tube for points, radii in vessels[1:]
                          for tube in path(points, radii, BLOOD))),
        *belonging(None, path(gullet, 7, BOWEL)),
        *belonging("trachea", tubes(
            [((180, -18, 0), fork, 10.5, 10.5), (fork, (-26, 14, -34), 9, 8),
             (fork, (-30, 14, 40), 8.5, 7.5)], ((0, CARTILAGE), (2, AIR))))]


def _skeleton() -> list[Solid]:
    solids = path(_along_spine(-356, 170, 8), 12, DISC)
    heights = [16, *(a - b for a, b in pairwise(VERTEBRAE.values()))]
    for (name, z), height in zip(VERTEBRAE.items(), heights, strict=True):
        y, droop = SPINE.at(z) + _half_depth(z) + 9, 14 if name[0] == "T" else 4
        solids += [
            _vertebral_body(z, 0.4 * height),
            blob((z - 2, y, 0), (0.44 * height, 15, 17), ((0, CORTEX), (3, SPONGY))),  # arch
            *path([(z - 3, y + 13, 0), (z - droop, y + 29, 0)], 4.2, BONE),
            *both(*path([(z, y + 1, 14), (z, y + 7, 36)], (5, 4), BONE))]
    canal: list[Point] = [(z, y + _half_depth(z) + 9, x) for z, y, x in _along_spine(-400, 185, 8)]
    solids += [
        blob((-405, 66, 0), (62, 15, 50), BONE, (0, 0, -18)),  # sacrum
        *path(canal, 8.5, CORD)]
    solids = [*belonging("spine", solids),
        Solid((-22, -75, 0), (73, 35, 24), _sternum, BONE),
        Solid((-394, 5, 0), (98, 75, 136), _iliac, BONE)]
    for number, (drop, end, sternal_z) in enumerate(RIBS, 1):
        rib = _rib(VERTEBRAE[f"T{number}"], drop, end)
        if sternal_z is not None:
            front = CAGE.middle.at(sternal_z) - CAGE.depth.at(sternal_z) + 2
            solids += both(*path([rib[-1], (sternal_z, front, 17)], 5, CARTILAGE))
        solids += both(*path(rib, 5.2, BONE))
    return solids + both(
        *path([(54, -58, 18), (70, -66, 60), (104, -22, 122)], 6.5, BONE),  # clavicle
        blob((-482, 6, 96), (33, 33, 30), BONE),  # socket of the hip, then head of femur
        blob((-484, 6, 100), (26, 26, 26), ((0, CARTILAGE), (2, CORTEX), (4, SPONGY))))
# fmt: on
