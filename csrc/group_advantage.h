// What group_advantage.cpp asks group_advantage.cu for: the maths is there.
#pragma once

struct Shaping {
    enum By { group, batch, none, centred } by;                            // whose std divides the deviations
    double gamma;                                                          // A = |dr|^gamma (dr - lam)
    bool recenter, after;                                                  // lam; divide A by its own batch std
    double clip;                                                           // to [-clip, clip]; infinite: not
    bool whole_batch() const { return by == batch || by == centred || after; }
};
