import { nameOf } from '@/features/batches/name';
import { api } from '@/lib/api';
import { batch, job, list } from '@/types/api';
import { useQuery } from '@tanstack/react-query';
import { useEffect, useRef } from 'react';
import { useTranslation } from 'react-i18next';
import { useNavigate } from 'react-router';
import { endOf, justEnded, seenAfter, type Seen, type Watched } from './ended';
import { useNotify } from './setting';

const LOOK_EVERY_MS = 5_000; // browsers slow it down to once a minute in a tab that is long hidden

interface Told extends Watched {
  kind: 'training' | 'batch';
  path: string;
  name: string | null | undefined;
  model: string;
}

async function look(signal: AbortSignal): Promise<Told[]> {
  const [jobs, batches] = await Promise.all([
    api.get('/v1/fine_tuning/jobs?limit=20', list(job), signal),
    api.get('/v1/batches?limit=20', list(batch), signal),
  ]);
  return [
    ...jobs.data.map((each) => ({
      ...each,
      kind: 'training' as const,
      end: endOf(each.status),
      path: `/training/${each.id}`,
      name: each.user_provided_suffix,
    })),
    ...batches.data.map((each) => ({
      ...each,
      kind: 'batch' as const,
      end: endOf(each.status),
      path: `/batches/${each.id}`,
      name: nameOf(each),
    })),
  ];
}

/** Looks at the newest trainings and batches while the page is open, and tells of those that have ended. */
export function JobWatch() {
  const { t } = useTranslation();
  const navigate = useNavigate();
  const on = useNotify() === 'on';
  const before = useRef<Seen | null>(null);
  const { data } = useQuery({
    queryKey: ['job-watch'],
    queryFn: ({ signal }) => look(signal),
    enabled: on,
    refetchInterval: LOOK_EVERY_MS,
    refetchIntervalInBackground: true,
    gcTime: 0, // what was seen before a break would be told as news after it
  });
  useEffect(() => {
    if (!on) before.current = null;
    if (!on || !data) return;
    for (const each of justEnded(before.current, data)) {
      if (document.hasFocus() && window.location.pathname === each.path) continue; // it is being looked at
      const name = each.name ?? t(each.kind === 'training' ? 'job.untitled' : 'batches.untitled');
      const title = each.end ? t(`notify.${each.end}`, { name }) : name;
      const body = t(`notify.${each.kind}`, { model: each.model.split('/').at(-1) });
      show(title, body, each.id, () => void navigate(each.path));
    }
    before.current = seenAfter(before.current, data);
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
