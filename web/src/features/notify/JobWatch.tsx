import { api } from '@/lib/api';
import { job, list, type Job, type JobStatus } from '@/types/api';
import { useQuery } from '@tanstack/react-query';
import { useEffect, useRef } from 'react';
import { useTranslation } from 'react-i18next';
import { useNavigate } from 'react-router';
import { isEnded, justEnded } from './ended';
import { useNotify } from './setting';

const LOOK_EVERY_MS = 5_000; // browsers slow it down to once a minute in a tab that is long hidden

interface Look {
  at: number;
  jobs: Job[];
}

/** Looks at the newest jobs while the page is open, and tells of those that have ended. */
export function JobWatch() {
  const { t } = useTranslation();
  const navigate = useNavigate();
  const on = useNotify() === 'on';
  const before = useRef<{ at: number; seen: Map<string, JobStatus> } | null>(null);
  const { data } = useQuery({
    queryKey: ['job-watch'],
    queryFn: async ({ signal }): Promise<Look> => {
      const at = Date.now() / 1000;
      return { at, jobs: (await api.get('/v1/fine_tuning/jobs?limit=20', list(job), signal)).data };
    },
    enabled: on,
    refetchInterval: LOOK_EVERY_MS,
    refetchIntervalInBackground: true,
    gcTime: 0, // what was seen before a break would be told as news after it
  });
  useEffect(() => {
    if (!on) before.current = null;
    if (!on || !data) return;
    const last = before.current;
    for (const each of justEnded(last?.seen ?? null, data.jobs, last?.at ?? 0)) {
      const path = `/training/${each.id}`;
      if (document.hasFocus() && window.location.pathname === path) continue; // it is being looked at
      const name = each.user_provided_suffix ?? t('job.untitled');
      const title = isEnded(each.status) ? t(`notify.${each.status}`, { name }) : name;
      const body = t('notify.body', { model: each.model.split('/').at(-1) });
      show(title, body, each.id, () => void navigate(path));
    }
    const seen = new Map(last?.seen);
    for (const each of data.jobs) seen.set(each.id, each.status);
    before.current = { at: data.at, seen };
  }, [on, data, t, navigate]);
  return null;
}

function show(title: string, body: string, tag: string, onClick: () => void): void {
  try {
    const shown = new Notification(title, { body, tag, icon: '/icon.svg' }); // the tag: once, of several tabs
    shown.onclick = () => {
      window.focus();
      shown.close();
      onClick();
    };
  } catch {
    // Some phones let only service workers notify.
  }
}
