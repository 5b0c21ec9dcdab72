// One step of a sampler, as linear_step.cpp asks linear_step.cu for it: the maths is there.
#pragma once
#include "philox.h"

struct LinearStep {
    const void *x, *cond, *uncond, *w, *eps, *x_next;                      // (rows, d); null: not there
    double a, b, scale, c, std;
    int64_t rows, d;
    bool draw;                                                             // eps is drawn from key
    NoiseKey key;
    void *out, *logp;                                                      // null: not wanted
};
struct LinearStepGrads { const void *out, *logp; void *x, *cond, *uncond, *w; };       // null: none, or not wanted
